"""The public ops: arguments checked, implementation chosen, gradients attached.

    S_t = lam S_{t-1} + k_t^T v_t        o_t = q_t S_t        lam = exp(log_decay)

per head; the linear attention of MiniMax-01 and MiniMax-M1 (arXiv 2501.08313, section 2.2; arXiv 2506.13585).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat
from pallas_kernels.arguments import check_array, is_known
from pallas_kernels.ladder import Ladder

LADDER = Ladder(
    op="lightning_attention",
    package="pallas_kernels.lightning",
    implementations=("reference", "chunked", "hopper", "tpu"),
    preferred={"gpu": ("hopper",), "tpu": ("tpu",)},
    portable="chunked",
)
DECODE_LADDER = Ladder(
    op="lightning_attention_decode",
    package="pallas_kernels.lightning",
    implementations=("xla", "hopper", "tpu"),
    preferred={"gpu": ("hopper",), "tpu": ("tpu",)},
    portable="xla",
)


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
    forget_below: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention with one constant decay per head; differentiable, memory linear in T.

    Args:
      q, k: [B,T,H,K] float32 or bfloat16. Nothing is scaled: M1 uses no 1/sqrt(K).
      v: [B,T,H,V], same dtype.
      log_decay: [H] float32, <= 0: minus the slope of each head. A constant of the model: its gradient is zero.
      initial_state: [B,H,K,V] float32, the state before token 0, of token 0's segment; None for zeros.
      segment_ids: [B,T] int32, non-decreasing along T; None for one segment. The state is reset to zero where the id
        changes. Tokens with the id PADDING are not there: their output and gradients are zero, and they leave the state
        as it is, decay included. As the largest id PADDING can only stand at the end of a row.
      implementation: "auto" (the best that can run here), "reference", "chunked", "hopper" or "tpu".
      forget_below: a weight lam^n that is smaller may be taken as zero, in [0, 1): less work for heads that forget
        quickly, where an implementation has a use for it ("hopper", few heads of long rows). It changes o_t by at most
        forget_below / (1 - lam) * max |q_t k_j| |v_j|, states and gradients alike. 0 leaves out what is zero anyway.

    Returns:
      o [B,T,H,V] in q's dtype, and the float32 state [B,H,K,V] after the last real token: the last segment's, or
      initial_state for a row that is all padding.

    Raises:
      ValueError: a shape that does not match, a positive log_decay or segment_ids that go down (the last two only where
        the values are known, that is outside jit), an unknown implementation, or a named one that cannot run here, or
        forget_below outside [0, 1).
      TypeError: a dtype other than those above.
    """
    check(q, k, v, log_decay, initial_state, segment_ids)
    if not 0 <= forget_below < 1:
        raise ValueError(f"forget_below must be a weight in [0, 1): got {forget_below}")
    name = LADDER.choose(implementation, q, k, v)
    arrays = (q, k, v, log_decay, initial_state, segment_ids)
    axes = _compat.varying_axes(*arrays)
    how = name, (("forget_below", forget_below),) if name == "hopper" else ()
    return _attention_jit(how, *(x if x is None else _compat.vary_over(jnp.asarray(x), axes) for x in arrays))


def check(q, k, v, log_decay, initial_state, segment_ids):
    """Raises what `lightning_attention` says it raises about its arrays."""
    check_tokens("B,T,H", q, k, v)
    batch, length, heads, key_size = q.shape
    check_log_decay(log_decay, heads)
    if initial_state is not None:
        check_array("initial_state", initial_state, (batch, heads, key_size, v.shape[-1]), "[B,H,K,V]", "float32")
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, (batch, length), "[B,T]", "int32")
        if is_known(segment_ids) and (np.asarray(segment_ids)[:, 1:] < np.asarray(segment_ids)[:, :-1]).any():
            raise ValueError("segment_ids must not go down along T (PADDING, the largest id, stands last)")


def lightning_attention_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    pool: jax.Array,
    slots: jax.Array | None = None,
    *,
    layer: jax.Array | int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """One token for each of N sequences whose states live in a pool, which is updated in place. Not differentiable.

    Args:
      q, k: [N,H,K] float32 or bfloat16; v: [N,H,V], same dtype.
      log_decay: [H] float32, <= 0.
      pool: [P,H,K,V] float32. Donated: outside jit the array passed in is dead afterwards; inside jit, donate it there.
        A stack of layers [L,P,H,K,V] need not be sliced: let the scan over layers carry it whole, and say
      layer: int32 scalar, may be traced: log_decay is then [L,H], pool [L,P,H,K,V], and this layer's part of them is
        meant. The pool stays where it is.
      slots: [N] int32, the row of the pool that holds each sequence's state: distinct; negative for an idle sequence,
        whose output is zero and for which nothing is written. None: P = N, and sequence n has row n.
      implementation: "auto" (the best that can run here), "xla", "hopper" or "tpu".

    Returns:
      o [N,H,V] in q's dtype, and the pool with the N states advanced by one token.

    Raises:
      ValueError: a shape that does not match, a positive log_decay, slots that are equal or beyond the pool (where the
        values are known), an unknown implementation, or a named one that cannot run here.
      TypeError: a dtype other than those above.
    """
    check_tokens("N,H", q, k, v)
    sequences, heads, key_size = q.shape
    if layer is not None:
        return _decode_of_layer(q, k, v, log_decay, pool, slots, jnp.asarray(layer, jnp.int32), implementation)
    check_log_decay(log_decay, heads)
    if slots is None:
        check_array(
            "pool", pool, (sequences, heads, key_size, v.shape[-1]), "[N,H,K,V] (no slots are given)", "float32"
        )
    else:
        rows = pool.shape[0] if pool.ndim else 0
        check_array("pool", pool, (rows, heads, key_size, v.shape[-1]), "[P,H,K,V]", "float32")
        check_array("slots", slots, (sequences,), "[N]", "int32")
        if is_known(slots):
            used = np.asarray(slots)[np.asarray(slots) >= 0]
            if (used >= rows).any() or len(np.unique(used)) != len(used):
                raise ValueError(f"slots must be distinct rows of the pool, which has {rows}, or negative: got {slots}")
    name = DECODE_LADDER.choose(implementation, q, k, v)
    if slots is None and name != "xla":
        slots = jnp.arange(sequences, dtype=jnp.int32)
    return _decode(q, k, v, log_decay, pool, slots, name)


def _decode_of_layer(q, k, v, log_decay, pool, slots, layer, implementation):
    sequences, heads, key_size = q.shape
    layers, rows = pool.shape[:2]
    check_array("log_decay", log_decay, (layers, heads), "[L,H] (a layer is given)", "float32")
    shape = (layers, sequences if slots is None else rows, heads, key_size, v.shape[-1])
    check_array("pool", pool, shape, "[L,P,H,K,V] (a layer is given)", "float32")
    slots = jnp.arange(sequences, dtype=jnp.int32) if slots is None else slots
    check_array("slots", slots, (sequences,), "[N]", "int32")
    return _decode_among_layers(q, k, v, log_decay, pool, slots, layer, DECODE_LADDER.choose(implementation, q, k, v))


@functools.partial(jax.jit, static_argnames="name", donate_argnames="pool")
def _decode_among_layers(q, k, v, log_decay, pool, slots, layer, name):
    states, decode = pool.reshape(-1, *pool.shape[2:]), DECODE_LADDER.module(name).decode
    if name == "hopper":  # Its kernel finds the layer by itself.
        o, states = decode(q, k, v, log_decay, states, slots, layer)
    else:
        slots = jnp.where(slots < 0, slots, slots + layer * pool.shape[1])
        o, states = decode(q, k, v, log_decay[layer], states, slots)
    return o, states.reshape(pool.shape)


@functools.partial(jax.jit, static_argnames="name", donate_argnames="pool")
def _decode(q, k, v, log_decay, pool, slots, name):
    return DECODE_LADDER.module(name).decode(q, k, v, log_decay, pool, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q, k, v, log_decay, initial_state, segment_ids):
    return _folded(*how, "forward")(q, k, v, log_decay, initial_state, segment_ids)


def _attention_forward(how, *arrays):
    return _attention(how, *arrays), arrays


def _attention_backward(how, arrays, cotangents):
    dq, dk, dv, d_initial_state = _folded(*how, "backward")(*arrays, *cotangents)
    return dq, dk, dv, None, None if arrays[4] is None else d_initial_state, None


_attention.defvjp(_attention_forward, _attention_backward)
_attention_jit = jax.jit(_attention, static_argnums=0)  # else each call outside jit would compile its loops anew


def _merge(x):
    return x if x is None else x.reshape(-1, *x.shape[2:])


@functools.cache
def _folded(name: str, options: tuple[tuple[str, float], ...], direction: str):
    """An implementation's forward or backward, for which `vmap` means a larger batch: kernels need no batching rule."""

    @jax.custom_batching.custom_vmap
    def function(*arrays):
        return getattr(LADDER.module(name), direction)(*arrays, **dict(options))

    @function.def_vmap
    def fold(size, batched, *arrays):  # pyright: ignore[reportUnusedFunction]
        if batched[3]:  # Another decay for each: no single batch.
            axes = [0 if b else None for b in batched]
            outputs = [function(*(x if a is None else x[i] for x, a in zip(arrays, axes))) for i in range(size)]
            return jax.tree.map(lambda *x: jnp.stack(x), *outputs), (True,) * len(outputs[0])
        q, k, v, log_decay, *rest = (
            x if x is None or b or i == 3 else jnp.broadcast_to(x, (size, *x.shape))
            for i, (x, b) in enumerate(zip(arrays, batched))
        )
        outputs = function(*map(_merge, (q, k, v)), log_decay, *map(_merge, rest))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in outputs), (True,) * len(outputs)

    return function


def check_tokens(axes: str, q, k, v):
    """Raises what the ops say they raise about q, k and v, whose first axes these are."""
    key, value = f"[{axes},K]", f"[{axes},V]"
    if q.ndim != len(key.split(",")) or 0 in q.shape:
        raise ValueError(f"q must be {key}, no axis empty: got {q.shape}")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"q must be float32 or bfloat16: got {q.dtype}")
    check_array("k", k, q.shape, f"{key}, like q", q.dtype.name)
    check_array(
        "v", v, (*q.shape[:-1], v.shape[-1] if v.ndim else 0), f"{value} like q but for its last axis", q.dtype.name
    )


def check_log_decay(log_decay, heads):
    """Raises what the ops say they raise about log_decay."""
    check_array("log_decay", log_decay, (heads,), "[H]", "float32")
    if is_known(log_decay) and not ((np.asarray(log_decay) <= 0) & np.isfinite(log_decay)).all():
        raise ValueError(f"log_decay must be finite and <= 0 (minus the slope of each head): got {log_decay}")
