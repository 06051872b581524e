"""Devices that only generate change nothing: the versions are exact, and so is what they write."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from m1jax.chat import Tokenizer
from m1jax.rl.stream import split
from m1jax.rl.trainer import Trainer
from m1jax.train import placement
from m1jax.train.meter import MEASURED
from m1jax.train.run import Run
from tests import tiny
from tests.rl.test_trainer import RECIPE, Numbers, judge_of

RECIPE = dataclasses.replace(RECIPE, iterations=3)
OTHER = {*MEASURED, "sync_bytes"}


def train(directory, staleness, generators):
    recipe = dataclasses.replace(RECIPE, staleness=staleness, generator_mesh=generators)
    run = Run(directory, {"recipe": recipe})
    with placement.use_mesh("", split(generators)[0]):
        model = tiny.model()
        judge = judge_of(*range(20))
        params = jax.tree.leaves(
            nnx.split(Trainer(run, model, Numbers(), Tokenizer.tiny(), recipe, 0, judge=judge).train())[1]
        )
    run.log.close()
    return [np.asarray(x) for x in params], run.log.records


def figures(records):
    return [{name: r[name] for name in r if name not in OTHER} for r in records]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What the same devices make of it."""
    return [train(tmp_path_factory.mktemp(f"alone{k}") / "run", k, "") for k in (0, 1)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_one_device_generates(tmp_path, alone, staleness):
    want, records = alone[staleness]
    got, found = train(tmp_path / "run", staleness, "data=1")
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)
    assert figures(found) == figures(records)
    check(found, staleness, sum(x.nbytes for x in want))


def test_a_mesh_generates(tmp_path, alone):
    """What version 0 writes, which is two batches, is the same; then rounding has grown through Adam."""
    want, records = alone[1]
    _, found = train(tmp_path / "run", 1, "data=2")
    for a, b in zip(found[:3], records[:3]):
        for name in ("reward", "length", "perplexity", "heldout_reward"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-6)
    check(found, 1, 2 * sum(x.nbytes for x in want))


def check(records, staleness, received):
    """Versions are exact."""
    assert [r["staleness"] for r in records[1:]] == [0, staleness, staleness]
    assert [r["sync_bytes"] for r in records[1:]] == [received] * 3


def test_staleness_matters(alone):
    """Else the others prove nothing."""
    assert any((a != b).any() for a, b in zip(alone[0][0], alone[1][0]))
