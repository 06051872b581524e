import numpy as np

from m1jax.rl.aggregation import prompt_mean


def test_token_mean_within_a_prompt_then_mean_over_prompts():
    tokens, prompts = np.array([9, 3, 5, 1, 9, 4]), np.array([7, 7, 2, 2, 2, 5])
    weights = prompt_mean(tokens, prompts)
    np.testing.assert_allclose(weights, 1 / (3 * np.array([12, 12, 15, 15, 15, 4])), rtol=1e-15)
    # Every prompt has the same say, whatever its tokens; together they sum to one.
    for prompt in (7, 2, 5):
        np.testing.assert_allclose((weights * tokens)[prompts == prompt].sum(), 1 / 3, rtol=1e-15)
    order = np.array([5, 0, 3, 1, 4, 2])
    np.testing.assert_array_equal(prompt_mean(tokens[order], prompts[order]), weights[order])


def test_a_prompt_without_tokens_does_not_count():
    weights = prompt_mean(np.array([2, 0]), np.array([0, 1]))
    assert weights[0] == 0.5
    np.testing.assert_array_equal(prompt_mean(np.zeros(2, int), np.zeros(2, int)) * 0, np.zeros(2))
