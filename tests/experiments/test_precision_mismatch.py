"""The layers put together by hand are the model, and what is moved is moved by what is said."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cispo_vs_rivals.policy import portable
from experiments.precision_mismatch import amplification, at_size, figure3, run


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
