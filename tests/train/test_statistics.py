"""Parts add up to the whole, on the device and on the host."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.train import statistics
from m1jax.train.statistics import Correlation, Effective, Histogram, Max, Mean, Sum


def measured(x, weight):
    mask = weight > 0
    return {
        "mean": Mean.of(x, weight),
        "max": Max.of(x, mask),
        "sum": Sum(jnp.sum(weight)),
        "effective": Effective.of(x, mask),
        "correlation": Correlation.of(x, x**2 + weight, mask),
        "histogram": Histogram.of(x, mask, low=-4.0, high=4.0, bins=800),
    }


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=12).astype(np.float32), rng.integers(0, 3, 12).astype(np.float32)


def test_parts_add_up(data):
    x, weight = data
    y = x[weight > 0]
    want = {
        "mean": np.average(x, weights=weight),
        "max": y.max(),
        "sum": weight.sum(),
        "effective": y.sum() ** 2 / (len(y) * (y**2).sum()),
        "correlation": np.corrcoef(y, y**2 + weight[weight > 0])[0, 1],
        "histogram": np.quantile(y, 0.5, method="inverted_cdf"),
    }
    parts = [measured(x[s], weight[s]) for s in (slice(0, 5), slice(5, 6), slice(6, 12))]
    for merged in (
        statistics.merge(parts),
        statistics.merge(map(statistics.on_host, parts)),
        jax.jit(lambda: statistics.merge([statistics.empty(jax.eval_shape(measured, x, weight)), *parts]))(),
    ):
        found = statistics.values(statistics.on_host(merged))
        assert found.pop("histogram") == pytest.approx(want["histogram"], abs=0.01)
        assert found == pytest.approx({name: want[name] for name in found}, rel=1e-5)


def test_what_has_no_weight_has_no_say():
    x, weight = jnp.array([jnp.nan, 2.0]), jnp.array([0.0, 0.5])
    found = statistics.values(measured(x, weight))
    assert found.pop("histogram") == pytest.approx(2.0, abs=0.01)
    assert found == {"mean": 2.0, "max": 2.0, "sum": 0.5, "effective": 1.0, "correlation": None}
    nothing = statistics.values(statistics.on_host(measured(x, weight * 0)))
    assert nothing.pop("sum") == 0.0
    assert not any(value is not None for value in nothing.values())


def test_quantiles_of_a_histogram():
    values = jnp.array([-9.0, 0.1, 0.2, 0.3, 9.0])
    histogram = Histogram.of(values, values < 9, low=-1.0, high=1.0, bins=2000)
    for share, want in ((0.0, -1.0), (0.5, 0.1), (0.75, 0.2), (1.0, 0.3)):  # what is beyond the bounds is at them
        assert histogram.quantile(share) == pytest.approx(want, abs=2e-3)


def test_checkpoints_keep_every_bit(data):
    stats = statistics.on_host(measured(*data))
    assert statistics.from_json(json.loads(json.dumps(statistics.to_json(stats)))) == stats
