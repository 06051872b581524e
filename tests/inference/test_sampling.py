import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.inference import sample

LOGITS = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
ROWS = 20_000


def frequencies(**options):
    keys = jax.random.split(jax.random.key(0), ROWS)
    tokens, log_probs = sample(jnp.tile(LOGITS, (ROWS, 1)), keys, **options)
    return np.bincount(tokens, minlength=4) / ROWS, np.asarray(tokens), np.asarray(log_probs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution_and_log_probabilities(temperature):
    expected = np.array([0.5, 0.3, 0.15, 0.05]) ** (1 / temperature)
    expected /= expected.sum()
    found, tokens, log_probs = frequencies(temperature=temperature)
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / ROWS))
    np.testing.assert_allclose(log_probs, np.log(expected)[tokens], rtol=1e-5)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.79, 2), (0.81, 3), (1.0, 4)])
def test_nucleus(top_p, kept):
    expected = np.where(np.arange(4) < kept, [0.5, 0.3, 0.15, 0.05], 0)
    found, tokens, log_probs = frequencies(temperature=1.0, top_p=top_p)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=4 * np.sqrt(0.25 / ROWS))
    assert tokens.max() < kept
    # Those of the policy, not of the cut distribution: they are what training compares with.
    np.testing.assert_allclose(log_probs, np.asarray(LOGITS)[tokens], rtol=1e-5)


def test_temperature_zero_is_greedy():
    found, _, log_probs = frequencies(temperature=0.0)
    assert found[0] == 1
    np.testing.assert_allclose(log_probs, np.log(0.5), rtol=1e-5)


def test_impossible_tokens_are_never_drawn():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf]])
    tokens, _ = sample(jnp.tile(logits, (ROWS, 1)), jax.random.split(jax.random.key(1), ROWS), temperature=1.0)
    assert set(np.unique(tokens).tolist()) == {1, 3}
