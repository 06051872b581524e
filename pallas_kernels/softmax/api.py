"""The public op: arguments checked, implementation chosen.

    o_t = sum_s softmax_s(q_t k_s / sqrt(D)) v_s        over the positions s that t sees

the causal softmax attention of every eighth layer of MiniMax-M1 (arXiv 2506.13585), with grouped key/value heads
(arXiv 2305.13245).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat
from pallas_kernels.arguments import check_array, is_known
from pallas_kernels.ladder import Ladder

LADDER = Ladder(
    op="softmax_attention",
    package="pallas_kernels.softmax",
    implementations=("reference", "blocked", "hopper", "cudnn", "splash"),
    preferred={"gpu": ("cudnn", "hopper"), "tpu": ("splash",)},
    portable="blocked",
)


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    q_start: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal softmax attention with grouped heads; differentiable in q, k and v, memory linear in T and S.

    Args:
      q: [B,T,Hq,D] float32, bfloat16 or float16. Scores are scaled by 1/sqrt(D).
      k, v: [B,S,Hkv,D], same dtype. Hkv divides Hq: query head h reads key/value head h // (Hq / Hkv). S = T unless
        q_start is given.
      segment_ids: [B,T] int32, non-decreasing along T; None for one segment. A token sees the tokens of its own segment
        alone. Tokens with the id PADDING are not there: their output and gradients are zero. As the largest id PADDING
        can only stand at the end of a row.
      q_start: [B] int32, for a cache of keys and values: the position in S of each row's first query, 0 <= q_start < S.
        Query t of row b sees the positions up to q_start[b] + t. None for zeros. Not together with segment_ids.
      implementation: "auto" (the best that can run here), "reference" (writes all scores out: for tests), "blocked"
        (portable), "cudnn" (NVIDIA GPU), "hopper" (H100, H200) or "splash" (TPU).

    Returns:
      o [B,T,Hq,D] in q's dtype.

    Raises:
      ValueError: a shape that does not match, segment_ids that go down or a q_start outside the cache (the last two
        only where the values are known, that is outside jit), both of them together, an unknown implementation, or a
        named one that cannot run here.
      TypeError: a dtype other than those above.
    """
    check(q, k, v, segment_ids, q_start)
    name = LADDER.choose(implementation, q, k, v, segment_ids, q_start)
    arrays = (q, k, v, segment_ids, q_start)
    # Inside shard_map the gradient of an argument that all devices share is a sum over devices: marking it as varying
    # here lets JAX insert that sum.
    axes = _compat.varying_axes(*arrays)
    return _attention(name, *(x if x is None else _compat.vary_over(jnp.asarray(x), axes) for x in arrays))


@functools.partial(jax.jit, static_argnums=0)  # else each call outside jit would compile its loops anew
def _attention(name, *arrays):
    return LADDER.module(name).attention(*arrays)


def check(q, k, v, segment_ids, q_start):
    """Raises what `softmax_attention` says it raises about its arrays."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B,T,Hq,D], no axis empty: got {list(q.shape)}")
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"q must be float32, bfloat16 or float16: got {q.dtype}")
    batch, length, heads, size = q.shape
    if k.ndim != 4 or 0 in k.shape:
        raise ValueError(f"k must be [B,S,Hkv,D], no axis empty: got {list(k.shape)}")
    keys, kv_heads = (length if q_start is None else k.shape[1]), k.shape[2]
    meaning = "[B,T,Hkv,D] (without q_start there are as many keys as queries)" if q_start is None else "[B,S,Hkv,D]"
    check_array("k", k, (batch, keys, kv_heads, size), meaning, q.dtype.name)
    if heads % kv_heads:
        raise ValueError(f"k must have a number of heads that divides q's {heads}: got {kv_heads}")
    check_array("v", v, k.shape, "[B,S,Hkv,D], like k", q.dtype.name)
    if segment_ids is not None:
        if q_start is not None:
            raise ValueError("segment_ids and q_start cannot be given together: a cache row holds one sequence")
        check_array("segment_ids", segment_ids, (batch, length), "[B,T]", "int32")
        if is_known(segment_ids) and (np.asarray(segment_ids)[:, 1:] < np.asarray(segment_ids)[:, :-1]).any():
            raise ValueError("segment_ids must not go down along T (PADDING, the largest id, stands last)")
    if q_start is not None:
        check_array("q_start", q_start, (batch,), "[B]", "int32")
        if is_known(q_start) and not ((np.asarray(q_start) >= 0) & (np.asarray(q_start) < keys)).all():
            raise ValueError(f"q_start must be positions in the cache, 0 to {keys - 1}: got {q_start}")
