"""Softmax attention on NVIDIA Hopper (H100, H200): flash attention for packed rows in Pallas' Mosaic GPU dialect.

Query t of a row sees the keys from the first of its segment up to its own place, so two numbers per query say all of
segments, causality and padding. Blocks that lie outside of them are neither fetched nor computed, blocks inside need no
mask. Three kernels: `hopper_forward` for o; in `hopper_backward` one for dq, one for dk and dv (Dao 2023, arXiv
2307.08691). Every sum has one order, so results are the same bits each time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import _hopper
from pallas_kernels.kept import KEPT
from pallas_kernels.softmax import hopper_backward, hopper_forward
from pallas_kernels.softmax.hopper_tiles import FAR, TILE, Bounds
from pallas_kernels.softmax.reference import PADDING


def unsupported(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, q_start: jax.Array | None
) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.softmax_attention`), or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    if q.dtype != jnp.bfloat16:
        return f"it takes bfloat16: got {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"it takes heads of size 64 or 128: got D = {q.shape[-1]}"
    return None


def attention(q, k, v, segment_ids, q_start, *, interpret=False):
    """Shapes as in `api.softmax_attention`; o [B,T,Hq,D] in q's dtype."""

    @jax.custom_vjp
    def attend(q, k, v, bounds):
        return forward(q, k, v, bounds)[0]

    def forward(q, k, v, bounds):
        o, lse = (checkpoint_name(x, KEPT) for x in hopper_forward.forward(q, k, v, bounds, interpret=interpret))
        return o, (q, k, v, bounds, o, lse)

    def backward(saved, do):
        q, k, v, bounds, o, lse = saved
        delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[-1] - delta.shape[-1])))
        statistics = jnp.stack([lse, delta], axis=2)
        dq = hopper_backward.queries(q, k, v, do, statistics, bounds, interpret=interpret)
        dk, dv = hopper_backward.keys(q, k, v, do, statistics, bounds, interpret=interpret)
        return dq, dk, dv, None

    attend.defvjp(forward, backward)
    length, keys = q.shape[1], k.shape[1]
    q, k, v = (_padded(x) for x in (q, k, v))
    return attend(q, k, v, _bounds(length, keys, len(q), segment_ids, q_start))[:, :length]


def _padded(x):
    """With zeros behind the tokens up to a multiple of 8, which the copy engine wants (a copy, if there are any)."""
    missing = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _bounds(length, keys, batch, segment_ids, q_start) -> Bounds:
    place = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids is None:
        first = jnp.zeros((batch, length), jnp.int32)
        last = jnp.full((batch, keys), length - 1, jnp.int32)
    else:
        edge = jnp.ones((batch, 1), bool)
        change = segment_ids[:, 1:] != segment_ids[:, :-1]
        real = segment_ids != PADDING
        first = lax.cummax(jnp.where(jnp.concatenate([edge, change], axis=1), place, 0), axis=1)
        first = jnp.where(real, first, FAR)
        last = lax.cummin(jnp.where(jnp.concatenate([change, edge], axis=1), place, FAR), axis=1, reverse=True)
        # Behind the last segment its own end goes on, so that the numbers never go down.
        last = lax.cummax(jnp.where(real, last, -1), axis=1)
    offset = jnp.zeros(batch, jnp.int32) if q_start is None else q_start
    return Bounds(
        first=jnp.pad(first, ((0, 0), (0, -length % TILE)), constant_values=FAR),
        last=jnp.pad(last, ((0, 0), (0, -keys % TILE)), mode="edge"),
        offset=offset,
        keys=keys,
    )
