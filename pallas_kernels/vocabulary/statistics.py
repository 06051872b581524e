"""What is known of each token's distribution over some words, and how it adds up to what is known over more."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Statistics(NamedTuple):
    """Of scores x_v over words v, float32 [N] each."""

    top: jax.Array
    """max_v x_v"""
    mass: jax.Array
    """sum_v exp(x_v - top)"""
    weighted: jax.Array
    """sum_v exp(x_v - top) x_v"""
    chosen: jax.Array
    """The target's score; 0 if the target is not among the words."""

    def together(self, axis: int | str) -> "Statistics":
        """Over all words, where these are parts of them along an array axis, or over devices along a mesh axis."""
        if isinstance(axis, str):
            top, add = jax.lax.pmax(self.top, axis), lambda x: jax.lax.psum(x, axis)
            factor = jnp.exp(self.top - top)
        else:
            top, add = self.top.max(axis), lambda x: x.sum(axis)
            factor = jnp.exp(self.top - jnp.expand_dims(top, axis))
        return Statistics(top, add(self.mass * factor), add(self.weighted * factor), add(self.chosen))


def of_scores(scores: jax.Array, targets: jax.Array) -> Statistics:
    """Of float32 scores [..., V] and targets [...] that may lie outside of 0 ... V - 1."""
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    here = (targets >= 0) & (targets < scores.shape[-1])
    chosen = jnp.take_along_axis(scores, jnp.where(here, targets, 0)[..., None], axis=-1)[..., 0]
    return Statistics(top, weights.sum(-1), (weights * scores).sum(-1), jnp.where(here, chosen, 0.0))
