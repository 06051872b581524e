"""Parts add up to the whole, on the device and on the host."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.train import statistics
from m1jax.train.statistics import Max, Mean, Sum


def measured(x, weight):
    return {"mean": Mean.of(x, weight), "max": Max.of(x, weight > 0), "sum": Sum(jnp.sum(weight))}


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=12).astype(np.float32), rng.integers(0, 3, 12).astype(np.float32)


def test_parts_add_up(data):
    x, weight = data
    want = {"mean": np.average(x, weights=weight), "max": x[weight > 0].max(), "sum": weight.sum()}
    parts = [measured(x[s], weight[s]) for s in (slice(0, 5), slice(5, 6), slice(6, 12))]
    for merged in (
        statistics.merge(parts),
        statistics.merge(map(statistics.on_host, parts)),
        jax.jit(lambda: statistics.merge([statistics.empty(jax.eval_shape(measured, x, weight)), *parts]))(),
    ):
        found = statistics.values(statistics.on_host(merged))
        assert found == pytest.approx(want, rel=1e-6)


def test_what_has_no_weight_has_no_say():
    x, weight = jnp.array([jnp.nan, 2.0]), jnp.array([0.0, 0.5])
    assert statistics.values(measured(x, weight)) == {"mean": 2.0, "max": 2.0, "sum": 0.5}
    nothing = statistics.on_host(measured(x, weight * 0))
    assert statistics.values(nothing) == {"mean": None, "max": None, "sum": 0.0}


def test_no_figure_instead_of_nan():
    """JSON has no NaN."""
    stats = statistics.on_host(measured(jnp.array([jnp.nan]), jnp.ones(1)))
    assert statistics.values(stats)["mean"] is None


def test_checkpoints_keep_every_bit(data):
    stats = statistics.on_host(measured(*data))
    assert statistics.from_json(json.loads(json.dumps(statistics.to_json(stats)))) == stats
