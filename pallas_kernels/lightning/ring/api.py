"""The public op: arguments checked, implementation chosen.

With S the state n tokens ago and lam the head's decay,

    o = lam^n q S + sum_j lam^(n-j) (q k_j) v_j        j = 1 ... n, the new token the n-th

needs the keys and values of n tokens, but writes no state. Only every C tokens the keys and values are folded into it,
S <- lam^C S + sum_j lam^(C-j) k_j^T v_j. (For Mamba-2: ReplaySSM; here, where nothing but a constant decay is there, it
is the chunked form of lightning attention, arXiv 2501.08313, one token at a time.)
"""

import functools

import jax
import numpy as np

from pallas_kernels.arguments import check_array, is_known
from pallas_kernels.ladder import Ladder
from pallas_kernels.lightning.api import check_log_decay, check_tokens

LADDER = Ladder(
    op="lightning_attention_decode_ring",
    package="pallas_kernels.lightning.ring",
    implementations=("xla", "hopper"),
    preferred={"gpu": ("hopper",)},
    portable="xla",
)


def lightning_attention_decode_ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    pool: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    counts: jax.Array,
    slots: jax.Array,
    *,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One token for each of N sequences: their states of some tokens ago, and the tokens since, lie in pools.

    A step reads a state and the tokens since, and writes the new token; every C-th also writes the state. Afterwards
    (counts + 1) % C tokens stand behind it. Setting a count back takes as many tokens back. Not differentiable.

    Args:
      q, k: [N,H,K] float32 or bfloat16; v: [N,H,V], same dtype.
      log_decay: [H] float32, <= 0.
      pool: [P,H,K,V] float32, the states.
      keys, values: [P,H,C,K] and [P,H,C,V] in q's dtype: the tokens since, oldest first. What stands behind the
        `counts` first may be anything.
      counts: [N] int32, 0 <= count < C: how many tokens since the state, the new one not counted.
      slots: [N] int32, the row of the pools that belongs to each sequence: distinct; negative for an idle sequence,
        whose output is zero and for which nothing is written.
      implementation: "auto" (the best that can run here), "xla" (portable), or "hopper" (H100 and H200: bfloat16,
        heads of 64 or 128, C a multiple of 8 up to 64).

    The pools are donated: outside jit the arrays passed in are dead afterwards; inside jit, donate them there. Stacks
    of layers are viewed as one pool, as in `lightning_attention_decode`.

    Returns:
      o [N,H,V] in q's dtype, pool, keys and values.

    Raises:
      ValueError: a shape that does not match, a positive log_decay, counts or slots out of range or slots that are
        equal (where the values are known), an unknown implementation, or a named one that cannot run here.
      TypeError: a dtype other than those above.
    """
    check_tokens("N,H", q, k, v)
    sequences, heads, key_size = q.shape
    check_log_decay(log_decay, heads)
    rows = pool.shape[0] if pool.ndim else 0
    check_array("pool", pool, (rows, heads, key_size, v.shape[-1]), "[P,H,K,V]", "float32")
    capacity = keys.shape[2] if keys.ndim == 4 else 0
    check_array("keys", keys, (rows, heads, capacity, key_size), "[P,H,C,K]", q.dtype.name)
    check_array("values", values, (rows, heads, capacity, v.shape[-1]), "[P,H,C,V]", q.dtype.name)
    check_array("counts", counts, (sequences,), "[N]", "int32")
    check_array("slots", slots, (sequences,), "[N]", "int32")
    if is_known(counts) and not ((np.asarray(counts) >= 0) & (np.asarray(counts) < capacity)).all():
        raise ValueError(f"counts must be 0 to {capacity - 1}, one less than keys hold: got {counts}")
    if is_known(slots):
        used = np.asarray(slots)[np.asarray(slots) >= 0]
        if (used >= rows).any() or len(np.unique(used)) != len(used):
            raise ValueError(f"slots must be distinct rows of the pool, which has {rows}, or negative: got {slots}")
    name = LADDER.choose(implementation, q, k, v, keys)
    return _decode(q, k, v, log_decay, pool, keys, values, counts, slots, name)


@functools.partial(jax.jit, static_argnames="name", donate_argnames=("pool", "keys", "values"))
def _decode(q, k, v, log_decay, pool, keys, values, counts, slots, name):
    return LADDER.module(name).decode(q, k, v, log_decay, pool, keys, values, counts, slots)
