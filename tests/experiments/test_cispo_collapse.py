"""When a run has collapsed and what warned of it, on series where that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cispo_collapse import report, stored, survival
from experiments.cispo_vs_rivals.loop import History, State


def test_collapse_is_the_first_batch_below_half_of_the_best():
    accuracy = np.concatenate([np.linspace(0.2, 0.9, 50), np.full(50, 0.9), np.full(50, 0.1)])
    found = survival.collapse(accuracy)
    # Six of the ten last are at 0.1: 0.42 < 0.45.
    assert found == 106
    assert survival.collapse(accuracy[:100]) is None


def test_warning_is_relative_to_what_was_usual():
    steady = np.full(100, 2.0)
    assert survival.warning(steady) is None
    steady[60:] = 7.0
    assert survival.warning(steady) == 65  # the mean of five is above 6 with all five
    assert survival.warning(np.where(np.arange(100) < 60, 2.0, 0.1)) == 64
    assert survival.warning(np.where(np.arange(100) < 60, 2.0, np.nan)) == 65


def test_wilson():
    assert survival.wilson(8, 8) == pytest.approx((0.676, 1.0), abs=1e-3)
    assert survival.wilson(4, 8) == pytest.approx((0.215, 0.785), abs=1e-3)


def record(arm: str, mismatch: float, collapsed: int | None) -> dict:
    return dict(
        arm=arm, mismatch=mismatch, truncated=False, replay=False, collapsed=collapsed, batches=20,
        warned=dict.fromkeys(survival.DIAGNOSTICS, 3), accuracy_by_ten=[0.5, 0.1], gap_by_ten=[0.0, 0.1],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("falls", "said"), [((), "Not here"), ((10.0,), "only under mismatch (x 10)"), ((0.0, 1.0, 10.0), "without any")]
)
def test_the_verdict_and_the_picture(falls, said, tmp_path):
    records = [
        record(arm, mismatch, 9 if arm == "cispo" and mismatch in falls else None)
        for arm in ("cispo", "dapo", "dppo") for mismatch in (0.0, 1.0, 10.0) for _ in range(8)
    ]  # fmt: skip
    assert said in report.sentence(records)
    assert report.table(records).count("\n| ") >= 9
    report.picture(records, tmp_path / "survival.png")
    assert (tmp_path / "survival.png").stat().st_size > 5000


def test_a_block_of_runs_goes_on_where_it_was(tmp_path):
    begin = State({"w": jnp.zeros((2, 3))}, (jnp.zeros(2),), jax.random.split(jax.random.key(0)))
    state, history = stored.load(tmp_path / "x.npz", begin)
    assert state is begin
    assert history is None
    now = State({"w": jnp.ones((2, 3))}, (jnp.ones(2),), jax.random.split(jax.random.key(1)))
    made = History(*np.random.default_rng(0).random((len(History._fields), 2, 5)))
    stored.save(tmp_path / "x.npz", now, made)
    state, history = stored.load(tmp_path / "x.npz", begin)
    assert history is not None
    np.testing.assert_array_equal(history.gap, made.gap)
    np.testing.assert_array_equal(state.params["w"], now.params["w"])
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(now.key))
