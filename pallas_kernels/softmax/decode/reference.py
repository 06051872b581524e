"""The oracle: all pages gathered, all scores written out, in float32. For tests."""

import jax
import jax.numpy as jnp

from pallas_kernels import ladder

unsupported = ladder.always


def decode(q: jax.Array, keys: jax.Array, values: jax.Array, pages: jax.Array, lengths: jax.Array) -> jax.Array:
    """Shapes as in `api.softmax_attention_decode`; o [B,Hq,D] in q's dtype."""
    batch, heads, size = q.shape
    kv_heads = keys.shape[2]
    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, size)
    k, v = (x[pages].reshape(batch, -1, kv_heads, size).astype(jnp.float32) for x in (keys, values))
    seen = jnp.arange(k.shape[1]) < lengths[:, None]
    v = jnp.where(seen[..., None, None], v, 0.0)
    scores = jnp.einsum("bhgd,bshd->bhgs", grouped, k, precision="highest") / size**0.5
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    # Of nothing at all the sum is 0, not 0/0.
    weights = jnp.where(seen[:, None, None], jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    total = weights.sum(-1, keepdims=True)
    o = jnp.einsum("bhgs,bshd->bhgd", weights, v, precision="highest") / jnp.where(total == 0, 1.0, total)
    return o.reshape(q.shape).astype(q.dtype)
