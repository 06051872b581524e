"""Accumulation: a batch cut in any way gives the same update; one that is not finite gives none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.train import packing, statistics
from m1jax.train.optimizer import OptimizerConfig, updates_made
from m1jax.train.statistics import Max, Mean
from m1jax.train.step import accumulate, init_state, make_evaluation, make_train_step, token_counts
from pallas_kernels import PADDING


def loss_fn(params, batch):
    """Of a table of numbers, one per token: something to check by hand."""
    values = params["norm"][batch.tokens]
    loss = jnp.sum(batch.weight * (values - batch.targets) ** 2)
    return loss, {"value": Mean.of(values, batch.weight), "largest": Max.of(values, batch.mask)}


@pytest.fixture
def params():
    return {"norm": jnp.linspace(-1, 1, 10)}


def batch(rows, count=None):
    rng = np.random.default_rng(0)
    examples = [packing.example([1], rng.integers(0, 10, n - 1).tolist()) for n in (5, 9, 3, 8, 8, 2)]
    packed = packing.pack(examples, 8)
    packed = dataclasses.replace(packed, weight=packed.weight / packed.weight.sum())
    return packing.micro_batches(packed, rows, count)


def test_the_cut_does_not_matter(params):
    flat = batch(1).map(lambda x: x.reshape(-1, 8))
    values = np.asarray(params["norm"])[flat.tokens]
    want = np.zeros(10)
    np.add.at(want, flat.tokens, 2 * flat.weight * (values - flat.targets))
    for rows, count in ((5, None), (1, None), (2, 4), (3, 7)):
        cut = batch(rows, count)
        filled = int((cut.segment_ids != PADDING).any(axis=(1, 2)).sum())
        grads, loss, stats = jax.jit(lambda p, b, n: accumulate(loss_fn, p, b, n))(params, cut, filled)
        np.testing.assert_allclose(grads["norm"], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loss, (flat.weight * (values - flat.targets) ** 2).sum(), rtol=1e-5)
        assert stats["value"].value() == pytest.approx((flat.weight * values).sum(), rel=1e-5, abs=1e-6)
        assert stats["largest"].value() == values[flat.mask].max()
        found = statistics.on_host(make_evaluation(loss_fn)(params, cut))
        assert found["value"].value() == pytest.approx((flat.weight * values).sum(), rel=1e-5, abs=1e-6)


def test_token_counts():
    segments = jnp.array([[0, 0, 0, 1, 1, PADDING], [0, 1, 2, 2, 2, 2]])
    assert [float(x) for x in token_counts(segments)] == [11, 6 + 3 + 1 + 1 + 10]


def test_an_update_that_is_not_finite_is_left_out(params):
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=4).build(10)
    step = make_train_step(loss_fn, optimizer)
    good = batch(2)
    bad = dataclasses.replace(good, weight=good.weight * np.nan)
    state = init_state(params, optimizer)
    before = jax.device_get(state)
    state, report = step(state, bad)
    assert report.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state)._replace(step=0), before)
    assert (int(state.step), updates_made(state.opt_state)) == (1, 0)
    state, report = step(state, good)
    assert report.skipped == 0
    assert (int(state.step), updates_made(state.opt_state)) == (2, 1)
    assert float(report.learning_rate) == pytest.approx(0.025)  # the first of the warm-up: the other was not made
    assert float(report.tokens) == 29


def test_any_optimizer_will_do(params):
    optimizer = optax.sgd(0.5)
    state, report = make_train_step(loss_fn, optimizer)(init_state(params, optimizer), batch(2), planned=3.0)
    assert report.learning_rate is None
    grads, _, _ = accumulate(loss_fn, {"norm": jnp.linspace(-1, 1, 10)}, batch(2).map(jnp.asarray), 2)
    np.testing.assert_allclose(state.params["norm"], np.linspace(-1, 1, 10) - 0.5 * grads["norm"], rtol=1e-5, atol=1e-6)
