"""Trainer against sampler: factors by hand, over sequences that share rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.rl import corrections

# Two sequences in a row and padding behind: rho is 4, 1/4, 3 in the first and 0.9, 1.2 in the second.
RHO = np.array([[4.0, 0.25, 3.0, 0.9, 1.2, 7.0]])
MASK = np.array([[True, True, True, True, True, False]])
SEGMENTS = np.array([[0, 0, 0, 1, 1, 2**31 - 1]], np.int32)


@pytest.fixture
def pair():
    sampler = np.full((1, 6), -2.0)
    return tuple(jnp.asarray(x, jnp.float32) for x in (sampler + np.log(RHO), sampler))


def check(found, want):
    np.testing.assert_allclose(found, [[*want, 0]], rtol=1e-6)


def test_by_hand(pair):
    mask, segments = jnp.asarray(MASK), jnp.asarray(SEGMENTS)
    check(corrections.truncated(*pair, mask, cap=2.0), [2, 0.25, 2, 0.9, 1.2])
    check(corrections.icepop(*pair, mask), [4, 0, 3, 0.9, 1.2])
    check(corrections.truncated_sequence(*pair, mask, segments, cap=2.0), [2, 2, 2, 1.08, 1.08])
    # Geometric means: the third root of 3, 1.442; the root of 1.08, 1.039.
    check(corrections.geometric_rejection(*pair, mask, segments, low=0.9, high=1.1), [0, 0, 0, 1, 1])
    check(corrections.geometric_rejection(*pair, mask, segments, low=0.9, high=1.5), [1, 1, 1, 1, 1])
    check(corrections.geometric_rejection(*pair, mask, segments, low=1.1, high=1.5), [1, 1, 1, 0, 0])


def test_of_one_program_they_are_one(pair):
    _, same = pair
    mask, segments = jnp.asarray(MASK), jnp.asarray(SEGMENTS)
    spoilt = jnp.where(mask, same, jnp.nan)
    for found in (
        corrections.truncated(spoilt, spoilt, mask),
        corrections.icepop(spoilt, spoilt, mask),
        corrections.truncated_sequence(spoilt, spoilt, mask, segments),
        corrections.geometric_rejection(spoilt, spoilt, mask, segments, low=0.99, high=1.01),
    ):
        check(found, [1, 1, 1, 1, 1])


def test_what_neither_can_write_is_no_gap(pair):
    trainer, sampler = (x.at[0, 1].set(-jnp.inf) for x in pair)
    mask, segments = jnp.asarray(MASK), jnp.asarray(SEGMENTS)
    check(corrections.truncated(trainer, sampler, mask), [2, 1, 2, 0.9, 1.2])
    check(corrections.icepop(trainer, sampler, mask), [4, 1, 3, 0.9, 1.2])
    check(corrections.truncated_sequence(trainer, sampler, mask, segments, cap=20.0), [12, 12, 12, 1.08, 1.08])
    # The third root of 12 is 2.289.
    check(corrections.geometric_rejection(trainer, sampler, mask, segments, low=2.2, high=2.3), [1, 1, 1, 0, 0])


def test_what_float32_cannot_hold():
    trainer, sampler = jnp.array([[-80.0, -1e-3, -jnp.inf, -1.0]]), jnp.array([[-1e-3, -80.0, -1.0, -jnp.inf]])
    mask, segments = jnp.ones((1, 4), bool), jnp.zeros((1, 4), jnp.int32)
    for found in (
        corrections.truncated(trainer, sampler, mask),
        corrections.icepop(trainer, sampler, mask),
        corrections.truncated_sequence(trainer, sampler, mask, segments),
        corrections.geometric_rejection(trainer, sampler, mask, segments, low=0.5, high=2.0),
    ):
        assert np.isfinite(found).all()
