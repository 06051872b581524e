import numpy as np

from m1jax.rl.advantages import group_advantages, informative, overlong_penalty


def test_group_advantages():
    advantages = group_advantages(np.array([[1, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]]))
    np.testing.assert_allclose(advantages[0], (np.array([1, 0, 0, 0]) - 0.25) / np.std([1, 0, 0, 0]), rtol=1e-6)
    # The mean of three 0.1 is not 0.1 in floating point: the rounding error must not become an advantage.
    np.testing.assert_array_equal(advantages[1], 0)
    np.testing.assert_array_equal(group_advantages(np.full((1, 3), np.float32(0.1))), 0)
    assert advantages.dtype == np.float32


def test_informative():
    np.testing.assert_array_equal(informative(np.array([[1, 1, 1], [0, 0, 1], [0.1, 0.1, 0.1]])), [False, True, False])


def test_overlong_penalty_is_a_ramp_in_tokens():
    lengths = np.array([1, 80, 85, 90, 100, 120])
    penalty = overlong_penalty(lengths, max_tokens=100, buffer_tokens=20)
    np.testing.assert_allclose(penalty, [0, 0, -0.25, -0.5, -1, -1])
    np.testing.assert_array_equal(overlong_penalty(lengths, max_tokens=100, buffer_tokens=0), 0)
