"""CISPO against a float64 numpy oracle, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.rl.aggregation import prompt_mean
from m1jax.rl.losses import cispo_loss
from m1jax.train.statistics import merge, on_host, values

B, T = 6, 9
PROMPTS = np.array([0, 0, 1, 1, 1, 2])


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logp = -rng.exponential(1.0, (B, T))
    old_logp = logp + rng.normal(0, 1.5, (B, T))
    lengths = np.array([9, 3, 5, 1, 9, 4])
    mask = np.arange(T) < lengths[:, None]
    return logp, old_logp, rng.normal(size=B), mask


def arrays(batch, prompts=PROMPTS):
    """(logp, old_logp, advantage, mask, weight) as the loss takes them."""
    logp, old_logp, advantage, mask = batch
    weight = mask * prompt_mean(mask.sum(axis=1), prompts)[:, None]
    rest = (old_logp, np.broadcast_to(advantage[:, None], mask.shape), mask, weight)
    return tuple(jnp.asarray(x) for x in (logp, *rest))


def oracle(logp, old_logp, advantage, mask, prompts, max_weight, min_weight=0.0):
    """Equation 4 read literally, prompt by prompt; returns the loss and its gradient in logp."""
    loss, grad = 0.0, np.zeros_like(logp)
    groups = np.unique(prompts)
    for group in groups:
        rows = np.flatnonzero(prompts == group)
        normaliser = mask[rows].sum() * len(groups)
        for i in rows:
            for t in np.flatnonzero(mask[i]):
                weight = np.clip(np.exp(logp[i, t] - old_logp[i, t]), min_weight, max_weight)
                loss -= weight * advantage[i] * logp[i, t] / normaliser
                grad[i, t] = -weight * advantage[i] / normaliser
    return loss, grad


@pytest.mark.parametrize("bounds", [(0.0, 3.0), (0.0, 1.2), (0.5, 1.5)])
def test_value_and_gradient(batch, bounds):
    logp, *rest = arrays(batch)

    def loss(logp):
        return cispo_loss(logp, *rest, max_weight=bounds[1], min_weight=bounds[0])

    (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(logp)
    expected, expected_grad = oracle(*batch, prompts=PROMPTS, max_weight=bounds[1], min_weight=bounds[0])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Equal to the oracle's means: no gradient through the weight, and none missing at a clipped token.
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-9)
    mask, weights = batch[3], np.asarray(rest[3])
    assert (np.asarray(grad)[mask] != 0).all()
    ratio = np.exp(batch[0] - batch[1])
    stats = values(on_host(stats))
    np.testing.assert_allclose(
        stats["clipped"], (weights * ((ratio > bounds[1]) | (ratio < bounds[0]))).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(stats["ratio_max"], ratio[mask].max(), rtol=1e-5)
    np.testing.assert_allclose(stats["gap_max"], np.abs(np.log(ratio[mask])).max(), rtol=1e-5)
    np.testing.assert_allclose(stats["kl_k3"], (weights * (ratio - 1 - np.log(ratio))).sum(), rtol=1e-4)


def test_one_prompt_is_a_token_mean(batch):
    prompts = np.zeros(B)
    loss, _ = cispo_loss(*arrays(batch, prompts), max_weight=2.0)
    np.testing.assert_allclose(loss, oracle(*batch, prompts=prompts, max_weight=2.0)[0], rtol=1e-5)


def test_on_policy_gradient_is_reinforce(batch):
    logp, _, advantage, mask, weight = arrays(batch, np.zeros(B))
    grad = jax.grad(lambda x: cispo_loss(x, logp, advantage, mask, weight, max_weight=5.0)[0])(logp)
    np.testing.assert_allclose(grad, -advantage * mask / mask.sum(), rtol=1e-6)


def test_garbage_outside_the_mask_has_no_influence(batch):
    logp, old_logp, advantage, mask, weight = arrays(batch)

    def run(outside):
        def spoilt(x):
            return jnp.where(mask, x, outside)

        rest = (spoilt(old_logp), spoilt(advantage), mask, spoilt(weight))
        return jax.value_and_grad(lambda x: cispo_loss(x, *rest, max_weight=2.0), has_aux=True)(spoilt(logp))

    jax.tree.map(np.testing.assert_array_equal, run(0.0), run(jnp.nan))


def test_parts_add_up(batch):
    """Loss and statistics of a batch are those of its pieces, merged; in float32, weights from the whole."""
    whole, stats = cispo_loss(*arrays(batch), max_weight=2.0)
    parts = [
        cispo_loss(*(x[rows] for x in arrays(batch)), max_weight=2.0)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-6)
    merged, want = values(on_host(merge(p[1] for p in parts))), values(on_host(stats))
    assert merged.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, err_msg=name)


def test_a_small_gap_is_measured():
    """At ratios near one, r - 1 - log r is smaller than the rounding of r."""
    gap = np.float32(1e-4)
    one = jnp.ones((1, 1))
    _, stats = cispo_loss(one * gap, one * 0, one, one > 0, one, max_weight=2.0)
    stats = values(on_host(stats))
    assert stats["kl_k3"] == pytest.approx(np.expm1(1e-4) - 1e-4, rel=1e-2)
    assert stats["gap_max"] == pytest.approx(1e-4, rel=1e-6)
