"""Sums over the sequences that share rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sequence_sum(
    values: Float[Array, "batch time"], mask: Bool[Array, "batch time"], segment_ids: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """The sum over the masked-in tokens of a token's own sequence, at every such token; zero elsewhere."""
    time = values.shape[1]

    def one(values: jax.Array, mask: jax.Array, segments: jax.Array) -> jax.Array:
        place = jnp.where(mask, segments, time)  # segments count from 0 along a row: there are at most `time`
        sums = jax.ops.segment_sum(jnp.where(mask, values, 0.0), place, time + 1)
        return jnp.where(mask, sums[place], 0.0)

    return jax.vmap(one)(values, mask, segment_ids)


def sequence_mean(
    values: Float[Array, "batch time"], mask: Bool[Array, "batch time"], segment_ids: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Likewise, the mean."""
    count = sequence_sum(jnp.ones_like(values), mask, segment_ids)
    return sequence_sum(values, mask, segment_ids) / jnp.maximum(count, 1.0)
