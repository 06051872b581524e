"""Softmax attention on TPU by JAX's splash attention kernels (jax.experimental.pallas.ops.tpu.splash_attention)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from pallas_kernels import _compat, target
from pallas_kernels.softmax.reference import PADDING

_BLOCKS = 256
"""Blocks that a row may be cut into: which ones see each other must fit into scalar memory."""


def unsupported(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, q_start: jax.Array | None
) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.softmax_attention`), or None."""
    platform = target.target_platform()
    if platform != "tpu":
        return f"it needs a TPU, and this program is for {platform}"
    if q.dtype != jnp.bfloat16:
        return f"it takes bfloat16: the matrix units would quietly round {q.dtype} to it"
    if q.shape[-1] not in (64, 128, 256):
        return f"it takes heads of size 64, 128 or 256: got D = {q.shape[-1]}"
    if q_start is not None:
        return "it takes no q_start: its causal mask begins at the first key"
    if q.shape[1] > _BLOCKS * 1024:
        return f"it takes up to {_BLOCKS * 1024} tokens: got T = {q.shape[1]}"
    if _compat.varying_axes(q, k, v, segment_ids):
        return "it needs jax.shard_map(..., check_vma=False): its kernels do not say over which axes results differ"
    return None


def attention(q, k, v, segment_ids, q_start, *, interpret=False):
    """Shapes as in `api.softmax_attention`; o [B,T,Hq,D] in q's dtype."""
    del q_start
    length, size = q.shape[1], q.shape[-1]
    block = min(512 if length <= _BLOCKS * 512 else 1024, -(-length // 128) * 128)
    missing = -length % block
    kernel = _kernel(q.shape[2], (length + missing) // block, block, interpret)

    def pad(x):
        """Zeros behind the tokens, which see them but are not seen."""
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    segments = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (0, missing)), constant_values=PADDING)
        segments = splash_attention_kernel.SegmentIds(q=ids, kv=ids)
    o = jax.vmap(kernel)(pad(q * size**-0.5), pad(k), pad(v), segments).transpose(0, 2, 1, 3)[:, :length]
    # To the kernel padding is a segment like any other.
    return o if segment_ids is None else jnp.where((segment_ids == PADDING)[..., None, None], 0, o)


@functools.lru_cache(maxsize=16)
def _kernel(heads, blocks, block, interpret):
    """The kernel for rows of so many blocks.

    JAX looks at all T x T places of the mask to find out which blocks see each other: hours at a million tokens. For
    rows of two tokens to a block the answer is the same.
    """
    mask = splash_attention_mask.CausalMask((2 * blocks, 2 * blocks))
    with jax.ensure_compile_time_eval():
        small = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=_block_sizes(2),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
    tables = (small.fwd_mask_info, small.dq_mask_info, small.dkv_mask_info)
    place = np.arange(blocks * block, dtype=np.int32)
    return splash_attention_kernel.SplashAttentionKernel(
        *(jax.tree.map(np.asarray, table)._replace(q_sequence=place) for table in tables),
        **(small.kwargs | {"block_sizes": _block_sizes(block)}),
    )


def _block_sizes(block):
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return splash_attention_kernel.BlockSizes(**{f"block_{name}": block for name in names})
