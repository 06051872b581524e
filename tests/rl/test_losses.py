"""CISPO against a float64 numpy oracle, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.rl.losses import cispo_loss, prompt_mean_weights

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
    logp, old_logp, advantage, mask = batch

    def loss(logp):
        return cispo_loss(
            logp,
            *(jnp.asarray(x) for x in (old_logp, advantage, mask)),
            max_weight=bounds[1],
            min_weight=bounds[0],
            prompt_ids=jnp.asarray(PROMPTS),
        )

    (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logp, jnp.float32))
    expected, expected_grad = oracle(*batch, prompts=PROMPTS, max_weight=bounds[1], min_weight=bounds[0])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Equal to the oracle's means: no gradient through the weight, and none missing at a clipped token.
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-9)
    assert (np.asarray(grad)[mask] != 0).all()
    ratio = np.exp(logp - old_logp)
    weights = np.asarray(prompt_mean_weights(jnp.asarray(mask), jnp.asarray(PROMPTS)))
    np.testing.assert_allclose(
        stats["clipped"], (weights * ((ratio > bounds[1]) | (ratio < bounds[0]))).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(stats["ratio_max"], ratio[mask].max(), rtol=1e-5)
    np.testing.assert_allclose(stats["kl_k3"], (weights * (ratio - 1 - np.log(ratio))).sum(), rtol=1e-4)


def test_one_prompt_is_a_token_mean(batch):
    logp, old_logp, advantage, mask = (jnp.asarray(x) for x in batch)
    loss, _ = cispo_loss(logp, old_logp, advantage, mask, max_weight=2.0)
    np.testing.assert_allclose(loss, oracle(*batch, prompts=np.zeros(B), max_weight=2.0)[0], rtol=1e-5)


def test_on_policy_gradient_is_reinforce(batch):
    logp, _, advantage, mask = (jnp.asarray(x, jnp.float32) for x in batch)
    mask = mask.astype(bool)
    grad = jax.grad(lambda x: cispo_loss(x, logp, advantage, mask, max_weight=5.0)[0])(logp)
    np.testing.assert_allclose(grad, -advantage[:, None] * mask / mask.sum(), rtol=1e-6)


def test_garbage_outside_the_mask_has_no_influence(batch):
    logp, old_logp, advantage, mask = (jnp.asarray(x) for x in batch)
    clean = jax.value_and_grad(lambda x: cispo_loss(x, old_logp, advantage, mask, max_weight=2.0), has_aux=True)
    spoiled = jnp.where(mask, old_logp, jnp.nan)
    dirty = jax.value_and_grad(lambda x: cispo_loss(x, spoiled, advantage, mask, max_weight=2.0), has_aux=True)
    jax.tree.map(np.testing.assert_array_equal, clean(jnp.where(mask, logp, 0)), dirty(jnp.where(mask, logp, jnp.nan)))


def test_precomputed_weights_add_up_over_parts(batch):
    logp, old_logp, advantage, mask = (jnp.asarray(x) for x in batch)
    whole, stats = cispo_loss(logp, old_logp, advantage, mask, max_weight=2.0, prompt_ids=jnp.asarray(PROMPTS))
    weights = prompt_mean_weights(mask, jnp.asarray(PROMPTS))
    parts = [
        cispo_loss(logp[s], old_logp[s], advantage[s], mask[s], max_weight=2.0, weights=weights[s])
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-6)
    np.testing.assert_allclose(sum(p[1]["clipped"] for p in parts), stats["clipped"], rtol=1e-6)
    with pytest.raises(ValueError, match="not both"):
        cispo_loss(logp, old_logp, advantage, mask, max_weight=2.0, weights=weights, prompt_ids=jnp.asarray(PROMPTS))


def test_a_prompt_without_tokens_does_not_count():
    mask = jnp.array([[True, True], [False, False]])
    weights = prompt_mean_weights(mask, jnp.array([0, 1]))
    np.testing.assert_array_equal(weights, [[0.5, 0.5], [0, 0]])
    np.testing.assert_array_equal(prompt_mean_weights(jnp.zeros((2, 3), bool)), np.zeros((2, 3)))
