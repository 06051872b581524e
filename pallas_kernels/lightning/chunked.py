"""Lightning attention in chunks, in plain XLA: any device, memory linear in T.

Inside a chunk of C tokens the recurrence is a masked matrix product; from chunk to chunk only the state is carried:

    o  = ((q k^T) * within) v + into * (q S)         within_ij = lam^(i-j) for i >= j,  into_i = lam^(i+1)
    S' = keep * S + (onto * k)^T v                   onto_j = lam^(C-1-j),              keep   = lam^C

Each weight is the exponential of a number <= 0; factored as lam^i lam^-j they would overflow float32 once slope * C
exceeds 88. A segment's start inside the chunk, or padding at its end, only changes these four weights.
"""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat, ladder, target
from pallas_kernels.lightning.segments import is_real

unsupported = ladder.always

CHUNK = 256
"""Tokens per step on GPU and TPU, where steps are dear and products cheap."""
CHUNK_ON_CPU = 64
"""On CPU the products inside a chunk, which grow with it, are what costs (experiments/chunked_cpu)."""
GROUPS_ON_CPU = 4
"""XLA:CPU runs a product of this size on one thread, and independent operations on several once enough are ready."""
GROUPED_WIDTH = 512
"""Channels of all heads from which on the groups save more than their operations cost to start."""


def forward(q, k, v, log_decay, initial_state, segment_ids):
    """(o [B,T,H,V] in q's dtype, final_state [B,H,K,V] float32); arguments as in `lightning_attention`."""

    def step(chunk, state, weights):
        within, into, onto, keep = weights
        qc, kt, vc = chunk(q), _transposed(chunk(k)), chunk(v)
        scores = _dot("bhik,bhkj->bhij", qc, kt) * within
        oc = _dot("bhij,bhjv->bhiv", scores, vc) + into[..., None] * _dot("bhik,bhkv->bhiv", qc, state)
        state = keep[..., None, None] * state + _dot("bhkj,bhjv->bhkv", onto[..., None, :] * kt, vc)
        return (oc,), state

    axes = _compat.varying_axes(q, k, v, log_decay, initial_state, segment_ids)
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    o = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    o, initial_state = (_compat.vary_over(x, axes) for x in (o, initial_state))
    (o,), final_state = _over_chunks(step, (o,), initial_state, log_decay, segment_ids)
    return o, final_state


def backward(q, k, v, log_decay, initial_state, segment_ids, do, d_final_state):
    """(dq, dk, dv in their inputs' dtypes, d_initial_state float32) for the gradients `do` and `d_final_state`.

    dq_t = do_t S_t^T is the forward scan with do, v, k in the places of q, k, v, whose state is S^T. The gradient of
    the state runs from the right and gives dk and dv.
    """

    def step(chunk, d_state, weights):
        within, into, onto, keep = weights
        within = within.mT
        qt, kc, vc, doc = _transposed(chunk(q)), *(chunk(x) for x in (k, v, do))
        scores = _dot("bhjk,bhki->bhji", kc, qt) * within
        d_scores = _dot("bhjv,bhiv->bhji", vc, doc) * within
        dkc = _dot("bhji,bhki->bhjk", d_scores, qt) + onto[..., None] * _dot("bhjv,bhkv->bhjk", vc, d_state)
        dvc = _dot("bhji,bhiv->bhjv", scores, doc) + onto[..., None] * _dot("bhjk,bhkv->bhjv", kc, d_state)
        d_state = keep[..., None, None] * d_state + _dot("bhki,bhiv->bhkv", into[..., None, :] * qt, doc)
        return (dkc, dvc), d_state

    dq, _ = forward(do, v, k, log_decay, None if initial_state is None else initial_state.mT, segment_ids)
    axes = _compat.varying_axes(q, k, v, log_decay, initial_state, segment_ids, do, d_final_state)
    *outs, d_state = (_compat.vary_over(x, axes) for x in (jnp.zeros_like(k), jnp.zeros_like(v), d_final_state))
    (dk, dv), d_initial_state = _over_chunks(step, tuple(outs), d_state, log_decay, segment_ids, reverse=True)
    return dq, dk, dv, d_initial_state


def _over_chunks(step, outs, state, log_decay, segment_ids, reverse=False):
    """Folds `step(chunk, state, weights)` over the chunks of a row; the last chunk may be shorter.

    A step gets the state of some heads and `chunk`, which takes an array's part for these heads and tokens; it returns
    its parts of `outs` [B,T,H,D], as [B,heads,tokens,D], and the new state.
    """
    on_cpu = target.target_platform() == "cpu"
    chunk = CHUNK_ON_CPU if on_cpu else CHUNK
    whole, rest = divmod(outs[0].shape[1], chunk)
    heads, width = outs[0].shape[2:]
    groups = GROUPS_ON_CPU if on_cpu and heads % GROUPS_ON_CPU == 0 and heads * width >= GROUPED_WIDTH else 1
    heads //= groups
    decays = jnp.split(log_decay, groups)

    def at(start, size, carry):
        outs, states = carry
        if segment_ids is None:
            weights = uniform if size == chunk else [_weights(d, size) for d in decays]
        else:
            before = lax.dynamic_slice_in_dim(segment_ids, jnp.maximum(start - 1, 0), 1, axis=1)
            ids = lax.dynamic_slice_in_dim(segment_ids, start, size, axis=1)
            weights = [_segment_weights(d, ids, before) for d in decays]
        parts = [functools.partial(_chunk, start=start, size=size, first=g * heads, heads=heads) for g in range(groups)]
        chunks, states = zip(*map(step, parts, states, weights))
        outs = tuple(_store(out, jnp.concatenate(c, axis=1), start) for out, c in zip(outs, zip(*chunks)))
        return outs, states

    uniform = [_weights(d, chunk) for d in decays]
    carry = outs, tuple(jnp.split(state, groups, axis=1))
    if rest and reverse:
        carry = at(whole * chunk, rest, carry)
    if whole:
        carry = lax.fori_loop(0, whole, lambda i, c: at((whole - 1 - i if reverse else i) * chunk, chunk, c), carry)
    if rest and not reverse:
        carry = at(whole * chunk, rest, carry)
    outs, states = carry
    return outs, jnp.concatenate(states, axis=1)


def _weights(log_decay, size):
    """within [1,H,C,C], into [1,H,C], onto [1,H,C] and keep [1,H] of a chunk of one segment."""
    position = jnp.arange(size)
    distance = position[:, None] - position
    within = jnp.where(distance >= 0, jnp.exp(log_decay[:, None, None] * jnp.maximum(distance, 0)), 0.0)
    into = jnp.exp(log_decay[:, None] * (position + 1))
    onto = jnp.exp(log_decay[:, None] * (size - 1 - position))
    return within[None], into[None], onto[None], jnp.exp(log_decay * size)[None]


def _segment_weights(log_decay, segment_ids, before):
    """The same with B in front, for a chunk whose ids are [B,C]; the incoming state is of segment `before` [B,1]."""
    within, into, _, _ = _weights(log_decay, segment_ids.shape[1])
    real = is_real(segment_ids)
    count = real.sum(1, keepdims=True)
    # Ids do not go down, so the last real token's is the largest; without any the state stays with its segment.
    last = jnp.where(real, segment_ids, before).max(1, keepdims=True)
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & real[:, :, None]
    within = jnp.where(same[:, None], within, 0.0)
    into = jnp.where(((segment_ids == before) & real)[:, None], into, 0.0)
    to_end = jnp.maximum(count - 1 - jnp.arange(segment_ids.shape[1]), 0)
    onto = jnp.where(((segment_ids == last) & real)[:, None], jnp.exp(log_decay[:, None] * to_end[:, None]), 0.0)
    keep = jnp.where(last == before, jnp.exp(log_decay * count), 0.0)
    return within, into, onto, keep


def _chunk(x, start, size, first, heads):
    """Tokens start : start + size of some heads of x [B,T,H,D], as [B,heads,size,D]."""
    x = lax.dynamic_slice(x, (0, start, first, 0), (x.shape[0], size, heads, x.shape[3]))
    return _widened(x).swapaxes(1, 2)


def _transposed(x):
    """Of the last two axes. Without the barrier XLA:CPU would transpose within the products, which is slower."""
    return lax.optimization_barrier(x.mT)


def _widened(x):
    """XLA:CPU multiplies bfloat16 some 30 times slower than float32."""
    return x.astype(jnp.float32) if target.target_platform() == "cpu" else x


def _store(out, chunk, start):
    return lax.dynamic_update_slice_in_dim(out, chunk.swapaxes(1, 2).astype(out.dtype), start, axis=1)


def _dot(formula, a, b):
    """A product accumulated in float32. Beside bfloat16 the other operand is bfloat16 too; float32 is never TF32."""
    dtype = jnp.bfloat16 if jnp.bfloat16 in (a.dtype, b.dtype) else jnp.float32
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        formula, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )
