"""Norms in plain XLA."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.ladder import always as unsupported
from pallas_kernels.norms.api import Norm, Term

__all__ = ["normed", "unsupported"]


def normed(terms: Sequence[Term], norm: Norm, layer: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Arguments as in `api.normed`."""
    x = sum(a * factor for a, factor in terms)
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + norm.eps)
    y = (x32 * inverse).astype(x.dtype) * norm.weights[layer].astype(x.dtype)
    return y if gate is None else y * gate
