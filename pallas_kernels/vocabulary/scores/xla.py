"""Scores in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.ladder import always as unsupported
from pallas_kernels.vocabulary.split import dot

__all__ = ["scores", "unsupported"]

FEW = 8
"""Rows up to which the CUDA cores of a GPU multiply float32 as fast as weights come from memory."""


def scores(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    """Arguments as in `api.vocabulary_scores`."""
    on_cores = len(hidden) <= FEW or target.target_platform() != "gpu"
    if weight.dtype == hidden.dtype and not on_cores:  # products of bfloat16 are exact in float32
        return dot("ti,vi->tv", hidden, weight)
    # On a GPU "highest" is no product for matrix units; six of bfloat16 are.
    precision = "highest" if on_cores else "BF16_BF16_F32_X6"
    return jnp.einsum("ti,vi->tv", hidden.astype(jnp.float32), weight.astype(jnp.float32), precision=precision)
