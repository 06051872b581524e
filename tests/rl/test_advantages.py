import numpy as np
import pytest

from m1jax.rl.advantages import Advantages, informative

REWARDS = np.array([1, 0, 0, 0, 0.5, 0.1, 0.1, 0.1, 1, 1], np.float32)
PROMPTS = np.array([3, 3, 3, 3, 1, 1, 1, 1, 2, 2])
MEANS = np.array([0.25] * 4 + [0.2] * 4 + [1] * 2)


def test_of_the_report():
    """(R - mean) / std over the responses to a prompt, divisor G."""
    advantages = Advantages()(REWARDS, PROMPTS)
    for prompt in (3, 1):
        mine = REWARDS[prompt == PROMPTS].astype(np.float64)
        np.testing.assert_allclose(advantages[prompt == PROMPTS], (mine - mine.mean()) / mine.std(), rtol=1e-6)
    np.testing.assert_array_equal(advantages[-2:], 0)
    assert advantages.dtype == np.float32


def test_equal_rewards_get_exactly_zero():
    # The mean of three 0.1 is not 0.1 in floating point: the rounding error must not become an advantage.
    for kind in (Advantages(), Advantages(scale="batch"), Advantages(scale=None), Advantages(baseline="batch")):
        for rewards in (np.full(4, 0.1), np.full(3, np.float32(0.1)), np.zeros(1)):
            np.testing.assert_array_equal(kind(rewards, np.zeros(len(rewards), int)), 0)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        (Advantages(scale=None), lambda g, everything: g - g.mean()),
        # ScaleRL: by the deviation of all advantages, not of all rewards, whose groups' means differ.
        (Advantages(scale="batch"), lambda g, everything: (g - g.mean()) / (everything - MEANS).std()),
        (Advantages(ddof=1, epsilon=1e-4), lambda g, everything: (g - g.mean()) / (g.std(ddof=1) + 1e-4)),
        (
            Advantages(baseline="batch", scale="batch", ddof=1),
            lambda g, everything: (g - everything.mean()) / everything.std(ddof=1),
        ),
    ],
)
def test_the_others(kind, want):
    everything = REWARDS.astype(np.float64)
    found = kind(REWARDS, PROMPTS)
    for prompt in (3, 1):
        mine = everything[prompt == PROMPTS]
        np.testing.assert_allclose(found[prompt == PROMPTS], want(mine, everything), rtol=1e-6)


def test_informative():
    assert [informative(np.array(g, float)) for g in ([1, 1, 1], [0, 0, 1], [0.1, 0.1, 0.1])] == [False, True, False]
    assert not informative(np.zeros(0))
