"""What a token counts under each convention."""

import numpy as np
import pytest

from m1jax.rl import aggregation
from m1jax.rl.aggregation import Responses

TOKENS, PROMPTS = np.array([9, 3, 5, 1, 9, 4]), np.array([7, 7, 2, 2, 2, 5])


def of(tokens=TOKENS, prompts=PROMPTS, **rest):
    return Responses(tokens=tokens, prompts=prompts, **(dict(batch_tokens=100, updates=4, limit=16) | rest))


def test_prompt_mean():
    """Token mean within a prompt, then mean over prompts."""
    weights = aggregation.prompt_mean(of())
    np.testing.assert_allclose(weights, 1 / (3 * np.array([12, 12, 15, 15, 15, 4])), rtol=1e-15)
    # Every prompt has the same say, whatever its tokens; together they sum to one.
    for prompt in (7, 2, 5):
        np.testing.assert_allclose((weights * TOKENS)[prompt == PROMPTS].sum(), 1 / 3, rtol=1e-15)
    order = np.array([5, 0, 3, 1, 4, 2])
    np.testing.assert_array_equal(aggregation.prompt_mean(of(TOKENS[order], PROMPTS[order])), weights[order])


def test_a_prompt_without_tokens_does_not_count():
    assert aggregation.prompt_mean(of(np.array([2, 0]), np.array([0, 1])))[0] == 0.5
    assert aggregation.sequence_mean(of(np.array([2, 0]), np.array([0, 1])))[0] == 0.5
    nothing = of(np.zeros(2, int), np.zeros(2, int), batch_tokens=0)
    for kind in ("prompt_mean", "token_mean", "sequence_mean", "constant", "batch_token_mean", "mixed"):
        assert np.isfinite(getattr(aggregation, kind)(nothing)).all()


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("token_mean", np.full(6, 1 / 31)),
        ("sequence_mean", 1 / (6 * TOKENS)),
        ("constant", np.full(6, 1 / (6 * 16))),
        ("batch_token_mean", np.full(6, 4 / 100)),
        ("mixed", (1 / (6 * TOKENS) + 1 / 31) / 2),
    ],
)
def test_the_others(kind, want):
    np.testing.assert_allclose(getattr(aggregation, kind)(of()), want, rtol=1e-15)


@pytest.mark.parametrize("kind", ["prompt_mean", "token_mean", "sequence_mean", "mixed"])
def test_means_sum_to_one(kind):
    assert (getattr(aggregation, kind)(of()) * TOKENS).sum() == pytest.approx(1, rel=1e-14)
