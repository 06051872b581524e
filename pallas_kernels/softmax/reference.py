"""The oracle: softmax attention written out in float32, scores and all. For tests; memory grows with T * S."""

import jax
import jax.numpy as jnp

from pallas_kernels import ladder

unsupported = ladder.always

PADDING = 2**31 - 1  # int32 max: a segment id of tokens that are not there


def visible(T: int, S: int, segment_ids: jax.Array | None, q_start: jax.Array | None) -> jax.Array:
    """[B or 1, T, S] bool: which key each query sees."""
    i = jnp.arange(T)[None, :, None] + (0 if q_start is None else q_start[:, None, None])
    seen = i >= jnp.arange(S)[None, None, :]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        seen = seen & same & (segment_ids != PADDING)[:, :, None]
    return seen


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, q_start: jax.Array | None
) -> jax.Array:
    """Shapes as in `api.softmax_attention`; o [B, T, Hq, D] in q's dtype. Differentiable by JAX itself."""
    B, T, Hq, D = q.shape
    S, Hkv = k.shape[1:3]
    grouped = q.astype(jnp.float32).reshape(B, T, Hkv, Hq // Hkv, D)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    seen = visible(T, S, segment_ids, q_start)[:, None, None]
    scores = jnp.einsum("bthgd,bshd->bhgts", grouped, k, precision="highest") / D**0.5
    # A row that sees nothing (padding) must give zero and zero gradients, not the 0/0 of an empty softmax.
    anything = seen.any(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.where(anything, -jnp.inf, 0.0)), axis=-1)
    weights = jnp.where(anything, weights, 0.0)
    return jnp.einsum("bhgts,bshd->bthgd", weights, v, precision="highest").reshape(q.shape).astype(q.dtype)
