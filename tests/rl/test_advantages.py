import numpy as np

from m1jax.rl.advantages import group_advantages, informative


def test_group_advantages():
    advantages = group_advantages(np.array([1, 0, 0, 0], np.float32))
    np.testing.assert_allclose(advantages, (np.array([1, 0, 0, 0]) - 0.25) / np.std([1, 0, 0, 0]), rtol=1e-6)
    assert advantages.dtype == np.float32
    # The mean of three 0.1 is not 0.1 in floating point: the rounding error must not become an advantage.
    np.testing.assert_array_equal(group_advantages(np.full(4, 0.1)), 0)
    np.testing.assert_array_equal(group_advantages(np.full(3, np.float32(0.1))), 0)
    np.testing.assert_array_equal(group_advantages(np.zeros(1, np.float32)), 0)


def test_informative():
    assert [informative(np.array(g)) for g in ([1, 1, 1], [0, 0, 1], [0.1, 0.1, 0.1])] == [False, True, False]
    assert not informative(np.zeros(0))
