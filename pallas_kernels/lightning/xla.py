"""One token for each of a set of sequences whose states live in a pool: portable XLA."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import ladder

unsupported = ladder.always


def decode(q, k, v, log_decay, pool, slots):
    """(o [N,H,V] in q's dtype, pool [P,H,K,V] float32); arguments as in `lightning_attention_decode`."""
    state = pool if slots is None else pool.at[slots].get(mode="fill", fill_value=0.0)
    update = k.astype(jnp.float32)[..., :, None] * v.astype(jnp.float32)[..., None, :]
    # lam - 1 keeps the digits that lam near 1 would lose, always to the same side, step after step.
    state = state + (jnp.expm1(log_decay)[:, None, None] * state + update)
    o = jnp.einsum("nhk,nhkv->nhv", q.astype(jnp.float32), state, precision=lax.Precision.HIGHEST)
    if slots is None:  # no gather and no scatter, which on CPU took four fifths of the time
        return o.astype(q.dtype), state
    idle = slots < 0
    pool = pool.at[jnp.where(idle, pool.shape[0], slots)].set(state, mode="drop", unique_indices=True)
    return jnp.where(idle[:, None, None], 0.0, o).astype(q.dtype), pool
