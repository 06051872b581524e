"""Portable XLA: blocks of keys are gathered from their pages, as far as the longest sequence reaches.

The memory of one block at a time; a running maximum and sum put them together (Milakov and Gimelshein,
arXiv 1805.02867).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import ladder
from pallas_kernels._compat import vary_over, varying_axes

unsupported = ladder.always

KEYS = 512
"""Of every sequence that are gathered at a time."""
FLOOR = -1e30
"""Start of the running maximum: finite, so that no infinities are subtracted."""


def decode(q: jax.Array, keys: jax.Array, values: jax.Array, pages: jax.Array, lengths: jax.Array) -> jax.Array:
    """Shapes as in `api.softmax_attention_decode`; o [B,Hq,D] in q's dtype."""
    batch, heads, size = q.shape
    _, page_size, kv_heads, _ = keys.shape
    capacity = pages.shape[1] * page_size
    block = min(KEYS, capacity)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, size)
    # Tokens in rows: the order in memory that the products below would like does not reach the pool, which XLA would
    # copy into it for every token.
    keys, values = (x.reshape(-1, kv_heads * size) for x in (keys, values))

    def step(i, carry):
        top, total, acc = carry
        place = i * block + jnp.arange(block)
        at = pages[:, jnp.minimum(place, capacity - 1) // page_size] * page_size + place % page_size
        seen = place < lengths[:, None]
        # What nobody wrote may be no number, even times zero.
        k, v = (jnp.where(seen[..., None], x[at], 0).reshape(*at.shape, kv_heads, size) for x in (keys, values))
        scores = jnp.where(seen[:, None, None], _dot("bhgd,bshd->bhgs", grouped, k) * size**-0.5, -jnp.inf)
        new = jnp.maximum(top, scores.max(-1))
        weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        total = total * shrink + weights.sum(-1)
        acc = acc * shrink[..., None] + _dot("bhgs,bshd->bhgd", weights.astype(v.dtype), v)
        return new, total, acc

    axes = varying_axes(q, keys, values, pages, lengths)
    shape = grouped.shape[:-1]
    start = (jnp.full(shape, FLOOR), jnp.zeros(shape), jnp.zeros(grouped.shape, jnp.float32))
    blocks = (lengths.max() + block - 1) // block
    _, total, acc = jax.lax.fori_loop(0, blocks, step, tuple(vary_over(x, axes) for x in start))
    o = acc / jnp.where(total == 0, 1.0, total)[..., None]
    return o.reshape(q.shape).astype(q.dtype)


# float32 stays float32 on every chip; products of bfloat16 need and get no more than one pass.
_dot = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
