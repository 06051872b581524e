"""Updates that would ruin a run are left out, and their batches kept."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.train import guards, packing

BATCH = packing.micro_batches(packing.pack([packing.example([1, 2], [3, 4])], 3), 1)


@pytest.mark.parametrize(("loss", "gradient"), [(np.nan, 1.0), (1.0, np.inf), (-np.inf, np.nan)])
def test_a_bad_update_is_left_out(loss, gradient):
    new, old = {"w": jnp.full(3, np.nan)}, {"w": jnp.ones(3)}
    kept, skipped = jax.jit(guards.apply_if_finite)(new, old, loss, {"w": jnp.full(3, gradient)})
    np.testing.assert_array_equal(kept["w"], old["w"])
    assert skipped == 1


def test_a_good_update_is_applied():
    kept, skipped = guards.apply_if_finite({"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, jnp.float32(2), {"w": jnp.ones(3)})
    assert not kept["w"].any()
    assert skipped == 0


def test_stop_keeps_the_batch(tmp_path):
    guard = guards.NonFiniteGuard(tmp_path)
    assert not guard.check(1, 0.0, BATCH, {"loss": 1.0})
    with pytest.raises(UserError, match=r"update 2.*not finite \(loss nan\).*step-2\.npz"):
        guard.check(2, 1.0, BATCH, {"loss": np.nan})
    np.testing.assert_array_equal(np.load(tmp_path / "nonfinite/step-2.npz")["tokens"], BATCH.tokens)
    figures = json.loads((tmp_path / "nonfinite/step-2.json").read_text(), parse_constant=pytest.fail)
    assert figures == {"loss": None, "nonfinite": {"loss": "nan"}}


def test_skip_goes_on_until_its_patience_ends(tmp_path):
    guard = guards.NonFiniteGuard(tmp_path, "skip", patience=2)
    assert guard.check(1, 1.0, BATCH, {})
    assert not guard.check(2, 0.0, BATCH, {})
    assert guard.check(3, 1.0, BATCH, {})
    with pytest.raises(UserError, match="2 updates in a row"):
        guard.check(4, 1.0, BATCH, {})


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(UserError, match="'stop' or 'skip'"):
        guards.NonFiniteGuard(tmp_path, "ignore")  # pyright: ignore[reportArgumentType]


def test_sigterm_becomes_a_request():
    before = signal.getsignal(signal.SIGTERM)
    with guards.StopRequests() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    assert signal.getsignal(signal.SIGTERM) == before
