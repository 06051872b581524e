"""The public op: arguments checked, implementation chosen.

Keys and values lie in pages of a pool, which a table assigns to sequences (PagedAttention, arXiv 2309.06180).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat
from pallas_kernels.arguments import check_array, is_known
from pallas_kernels.ladder import Ladder

LADDER = Ladder(
    op="softmax_attention_decode",
    package="pallas_kernels.softmax.decode",
    implementations=("reference", "xla", "hopper"),
    preferred={"gpu": ("hopper",)},
    portable="xla",
)


def softmax_attention_decode(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    pages: jax.Array,
    lengths: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of one new token for each of B sequences, whose keys and values lie in pages. For inference.

    Args:
      q: [B,Hq,D] float32 or bfloat16. Scores are scaled by 1/sqrt(D).
      keys, values: [P,S,Hkv,D], same dtype: a pool of P pages of S tokens, the new tokens' included. Hkv divides Hq:
        query head h reads key/value head h // (Hq / Hkv). A stack of layers [L,P,S,Hkv,D] need not be sliced: view it
        as [L*P,S,Hkv,D] and add layer * P to `pages`. A plain cache [B,S,Hkv,D] is a pool of one page a sequence:
        pages = arange(B)[:, None].
      pages: [B,n] int32, the pages of each sequence in order. Those that hold none of its `lengths` tokens may be
        anything.
      lengths: [B] int32, the tokens that a sequence sees, 0 <= length <= n * S. A sequence of length 0 is idle: its
        output is zero.
      implementation: "auto" (the best that can run here), "reference" (for tests), "xla" (portable), or "hopper" (H100
        and H200: bfloat16, D 64 or 128, S a multiple of 64, at most 64 query heads to a key/value head).

    Returns:
      o [B,Hq,D] in q's dtype.

    Raises:
      ValueError: a shape that does not match, lengths or pages out of range (only where the values are known, that is
        outside jit), an unknown implementation, or a named one that cannot run here.
      TypeError: a dtype other than those above.
    """
    _check(q, keys, values, pages, lengths)
    name = LADDER.choose(implementation, q, keys, values, pages, lengths)
    arrays = (q, keys, values, pages, lengths)
    axes = _compat.varying_axes(*arrays)
    return _decode(name, *(_compat.vary_over(jnp.asarray(x), axes) for x in arrays))


@functools.partial(jax.jit, static_argnums=0)  # else each call outside jit would compile its loops anew
def _decode(name, *arrays):
    return LADDER.module(name).decode(*arrays)


def _check(q, keys, values, pages, lengths):
    if q.ndim != 3 or 0 in q.shape:
        raise ValueError(f"q must be [B,Hq,D], no axis empty: got {list(q.shape)}")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"q must be float32 or bfloat16: got {q.dtype}")
    batch, heads, size = q.shape
    if keys.ndim != 4 or 0 in keys.shape:
        raise ValueError(f"keys must be [P,S,Hkv,D], no axis empty: got {list(keys.shape)}")
    count, page_size, kv_heads, _ = keys.shape
    check_array("keys", keys, (count, page_size, kv_heads, size), "[P,S,Hkv,D], D like q's", q.dtype.name)
    if heads % kv_heads:
        raise ValueError(f"keys must have a number of heads that divides q's {heads}: got {kv_heads}")
    check_array("values", values, keys.shape, "[P,S,Hkv,D], like keys", q.dtype.name)
    if pages.ndim != 2 or 0 in pages.shape:
        raise ValueError(f"pages must be [B,n], no axis empty: got {list(pages.shape)}")
    check_array("pages", pages, (batch, pages.shape[1]), "[B,n]", "int32")
    check_array("lengths", lengths, (batch,), "[B]", "int32")
    if is_known(lengths):
        longest = pages.shape[1] * page_size
        if not ((np.asarray(lengths) >= 0) & (np.asarray(lengths) <= longest)).all():
            raise ValueError(f"lengths must be 0 to {longest}, what {pages.shape[1]} pages hold: got {lengths}")
        if is_known(pages):
            used = np.arange(pages.shape[1]) * page_size < np.asarray(lengths)[:, None]
            if not (~used | ((np.asarray(pages) >= 0) & (np.asarray(pages) < count))).all():
                raise ValueError(f"pages must be those of a pool that has {count}, where tokens lie: got {pages}")
