"""The recurrence itself, token by token in float32: the truth that every other implementation is held against.

    S_t = lam S_{t-1} + k_t^T v_t        o_t = q_t S_t        lam = exp(log_decay)

(MiniMax-01, arXiv 2501.08313, section 2.2.) Memory is linear in T, forward and backward, but a step does little work:
use it to check, not to run.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat, ladder
from pallas_kernels.lightning.segments import is_real

unsupported = ladder.always


def forward(q, k, v, log_decay, initial_state, segment_ids):
    """(o [B,T,H,V] in q's dtype, final_state [B,H,K,V] float32); arguments as in `lightning_attention`."""
    loss, real = _loss_and_real(q, log_decay, segment_ids)

    def step(state, token):
        q, k, v, loss, real = token
        state = _decayed(state, loss) + real[..., None, None] * (k[..., :, None] * v[..., None, :])
        return state, real[..., None] * _times(q, state)

    state = _initial(q, k, v, initial_state, segment_ids)
    state, o = lax.scan(step, state, (*map(_time_first, (q, k, v)), loss, real))
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), state


def backward(q, k, v, log_decay, initial_state, segment_ids, do, d_final_state):
    """(dq, dk, dv in their inputs' dtypes, d_initial_state float32) for the gradients `do` and `d_final_state`.

    The states are recomputed from the left for dq; their gradients run from the right for dk and dv.
    """
    loss, real = _loss_and_real(q, log_decay, segment_ids)
    tokens = (*map(_time_first, (q, k, v, do)), loss, real)

    def from_left(state, token):
        _, k, v, do, loss, real = token
        state = _decayed(state, loss) + real[..., None, None] * (k[..., :, None] * v[..., None, :])
        return state, real[..., None] * _times(do, state.mT)

    def from_right(d_state, token):
        q, k, v, do, loss, real = token
        d_state = d_state + real[..., None, None] * (q[..., :, None] * do[..., None, :])
        dk, dv = real[..., None] * _times(v, d_state.mT), real[..., None] * _times(k, d_state)
        return _decayed(d_state, loss), (dk, dv)

    state = _initial(q, k, v, initial_state, segment_ids)
    _, dq = lax.scan(from_left, state, tokens)
    d_final_state = _compat.vary_over(d_final_state, _compat.varying_axes(q, k, v, do, segment_ids))
    d_initial_state, (dk, dv) = lax.scan(from_right, d_final_state, tokens, reverse=True)
    dq, dk, dv = (jnp.moveaxis(g, 0, 1).astype(x.dtype) for g, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, d_initial_state


def _loss_and_real(q, log_decay, segment_ids):
    """[T,B,H], lam - 1 of a token (-1 where a segment starts, 0 in padding); [T,B,1], 0 in padding, else 1."""
    batch, length, heads, _ = q.shape
    if segment_ids is None:
        loss, real = jnp.expm1(log_decay), jnp.ones((length, batch, 1), jnp.float32)
        return jnp.broadcast_to(loss, (length, batch, heads)), real
    real = is_real(segment_ids)
    starts = jnp.concatenate([jnp.zeros_like(real[:, :1]), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    loss = jnp.where(starts[..., None], -1.0, jnp.expm1(log_decay))
    loss = jnp.where(real[..., None], loss, 0.0)
    return jnp.moveaxis(loss, 1, 0), jnp.moveaxis(real, 1, 0)[..., None].astype(jnp.float32)


def _decayed(state, loss):
    """lam S, from lam - 1. Near 1, lam itself rounds by up to 3e-8 each step, always to the same side."""
    return state + loss[..., None, None] * state


def _initial(q, k, v, initial_state, segment_ids):
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    return _compat.vary_over(initial_state, _compat.varying_axes(q, k, v, segment_ids))


def _time_first(x):
    return jnp.moveaxis(x, 1, 0).astype(jnp.float32)


def _times(row, matrix):
    """row [B,H,X] times matrix [B,H,X,Y], in float32 on every platform."""
    return jnp.einsum("bhx,bhxy->bhy", row, matrix, precision=lax.Precision.HIGHEST)
