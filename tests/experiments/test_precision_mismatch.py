"""The layers put together by hand are the model, and what is moved is moved by what is said."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cispo_vs_rivals.policy import portable
from experiments.precision_mismatch import amplification, at_size, figure3, rl, run, switches
from experiments.precision_mismatch.switches import precision
from m1jax import demo
from m1jax.model import head
from m1jax.model.cache import LightningCache


def test_layers_put_together_are_the_model():
    with portable():
        assert amplification.same_as_the_model(amplification.Setting(depth=8), 0) < 1e-4


@pytest.mark.parametrize(("unit", "size"), [("float32", 2.0**-23), ("bfloat16", 2.0**-7)])
def test_weights_move_by_half_a_unit_on_average(unit, size):
    weights = jnp.array(np.random.default_rng(0).uniform(1, 2, 10_000).astype(np.float32))
    moved = np.abs(np.asarray(amplification.half_an_ulp(weights, unit, 1)) - np.asarray(weights)) / size
    assert set(np.round(moved).tolist()) == {0.0, 1.0}
    assert moved.mean() == pytest.approx(0.5, abs=0.02)


def test_slope_is_the_power_of_the_depth():
    assert amplification.slope({n: 3.0 * n**0.5 for n in (2, 4, 8)}) == pytest.approx(0.5)


def test_gap():
    sampler = np.log([[0.1, 0.5, 0.9]])
    found = figure3.compare(sampler, sampler + np.array([0.0, 0.1, -0.2]))
    assert found.largest == pytest.approx(0.2)
    assert found.mean == pytest.approx(0.1)
    assert figure3.compare(sampler, sampler).correlation == pytest.approx(1)


@pytest.mark.parametrize(("left", "said"), [(0.4, "is the cause"), (0.8, "not the cause")])
def test_the_verdict_asks_for_half_in_every_seed(left, said):
    records = [
        arm._asdict() | {"mean": left if arm.head == "float32" else 1.0, "seed": seed}
        for arm in figure3.ARMS for seed in at_size.SEEDS
    ]  # fmt: skip
    assert said in at_size.sentence(records)


def test_readme_shows_the_results(tmp_path):
    records = json.loads((run.HERE / "amplification.json").read_text())
    shown = set((run.HERE / "README.md").read_text().splitlines())
    assert {line for line in run.amplification_table(records).splitlines() if line.startswith("|")} <= shown
    run.profile(records, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 10_000


def test_a_head_in_bfloat16_has_bfloat16_logits_in_sampler_and_trainer():
    rng = np.random.default_rng(0)
    hidden, lm_head = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((1, 3, 8), (16, 8)))
    targets = jnp.array([[1, 2, 3]])

    def bits_below(x):
        return np.any(np.asarray(x).view(np.uint32) & 0xFFFF)

    with precision("bfloat16", "float32"):
        logits = head.logits(hidden, lm_head)
        logp, _ = head.log_probs(hidden, lm_head, targets)
    assert not bits_below(logits)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logp, expected, rtol=1e-6)
    assert bits_below(head.logits(hidden, lm_head))


def test_states_in_bfloat16_are_rounded_where_they_are_written():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(rng.normal(size=(1, 1, 2, 4)), jnp.float32) for _ in range(3))
    cache = LightningCache(switches.rounded(jnp.array(rng.normal(size=(2, 1, 2, 4, 4)), jnp.float32)))
    given = (0, q, k, v, jnp.zeros(2), None, None)
    _, exact = cache.attend(*given)
    with precision("float32", "bfloat16"):
        _, written = cache.attend(*given)
    assert not np.any(np.asarray(written.state[0]).view(np.uint32) & 0xFFFF)
    np.testing.assert_allclose(written.state[0], exact.state[0], rtol=2**-8)
    np.testing.assert_array_equal(written.state[1], cache.state[1])


def test_lines_are_read_back(tmp_path):
    at_size.Lines(tmp_path / "x.jsonl").add({"seed": 1})
    lines = at_size.Lines(tmp_path / "x.jsonl")
    lines.add({"seed": 2})
    assert [r["seed"] for r in at_size.Lines(tmp_path / "x.jsonl").records] == [1, 2]


def test_only_runs_that_came_to_their_end_are_told():
    arm, last = rl.ARMS[1], demo.RL.iterations
    batch = {"accuracy": 0.5, "pearson": 0.99, "sampler_gap": 0.1, "entropy": 1.0, "heldout_accuracy": 0.75}
    steps = [(0, last - 1), (0, last), (1, last - 1)]
    records = [arm._asdict() | batch | {"seed": seed, "step": step} for seed, step in steps]
    assert [[r["step"] for r in run] for run in rl.finished(records, arm)] == [[last - 1, last]]
    assert "| bfloat16 | float32 | free | 1 | 0.500 (0.500 to 0.500) |" in rl.table(records)
    assert "bfloat16" not in rl.table(records[2:])
