"""Portable XLA."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import ladder

unsupported = ladder.always


def decode(q, k, v, log_decay, pool, keys, values, counts, slots):
    """(o, pool, keys, values); arguments as in `lightning_attention_decode_ring`."""
    rows, capacity = pool.shape[0], keys.shape[2]
    idle = slots < 0
    place = jnp.where(idle, rows, slots)
    head = jnp.arange(q.shape[1])
    where = place[:, None], head, counts[:, None]
    keys = keys.at[where].set(k, mode="drop", unique_indices=True)
    values = values.at[where].set(v, mode="drop", unique_indices=True)

    token = jnp.arange(capacity)
    there = (token <= counts[:, None])[:, None]  # [N,1,C]
    age = jnp.maximum(counts[:, None] - token, 0)[:, None]
    weights = jnp.where(there, jnp.exp(log_decay[:, None] * age), 0.0)
    since = [jnp.where(there[..., None], _rows(x, place).astype(jnp.float32), 0.0) for x in (keys, values)]
    state = _rows(pool, place)
    q32 = q.astype(jnp.float32)
    o = _dot("nhc,nhcv->nhv", _dot("nhk,nhck->nhc", q32, since[0]) * weights, since[1])
    o += jnp.exp(log_decay * (counts[:, None] + 1))[..., None] * _dot("nhk,nhkv->nhv", q32, state)

    full = ~idle & (counts == capacity - 1)

    def fold(pool):
        # lam^C - 1 keeps the digits that lam^C near 1 would lose, always to the same side, time after time.
        advanced = state + jnp.expm1(log_decay * capacity)[:, None, None] * state
        advanced += _dot("nhck,nhcv->nhkv", weights[..., None] * since[0], since[1])
        return pool.at[jnp.where(full, slots, rows)].set(advanced, mode="drop", unique_indices=True)

    pool = lax.cond(full.any(), fold, lambda pool: pool, pool)
    return jnp.where(idle[:, None, None], 0.0, o).astype(q.dtype), pool, keys, values


def _rows(x, place):
    return x.at[place].get(mode="fill", fill_value=0)


def _dot(formula, a, b):
    return jnp.einsum(formula, a, b, precision=lax.Precision.HIGHEST)
