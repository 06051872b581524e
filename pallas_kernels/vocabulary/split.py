"""Float32 weights as sums of 16-bit numbers, for matrix units.

A product of float32 arrays does not run on the matrix units of a GPU or TPU. But bfloat16 activations need no more than
one 16-bit number each, and a float32 weight is a sum of few: their products are summed in float32.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import target

SCALE = 2.0**10
"""Of the parts. Float16 then holds weights up to 64, and of what is left of them all above 2^-35."""

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
"""A product of 16-bit arrays, in float32."""


def split(weight: jax.Array) -> list[jax.Array]:
    """16-bit arrays whose sum is SCALE times the weight, the largest first.

    Two of float16 on GPUs: 2^-22 of the weight is lost, and it must be below 64, else the sum is no number. Three of
    bfloat16 on TPUs, whose matrix units take nothing else.
    """
    dtype, count = (jnp.float16, 2) if target.target_platform() == "gpu" else (jnp.bfloat16, 3)
    rest, parts = weight.astype(jnp.float32) * SCALE, []
    for _ in range(count):
        # A mere cast there and back counts as exact to XLA, which would find the rest to be zero.
        part = jax.lax.reduce_precision(rest, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
        rest = rest - part
        parts.append(part.astype(dtype))
    return parts


def product(x: jax.Array, parts: Sequence[jax.Array]) -> jax.Array:
    """[N,V] float32: bfloat16 x [N,D] times the weight [V,D] of these parts, the smallest summed first."""
    repeated = jnp.concatenate([x.astype(parts[0].dtype)] * len(parts), axis=-1)
    return dot("ti,vi->tv", repeated, jnp.concatenate(parts[::-1], axis=-1)) / SCALE
