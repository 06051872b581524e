"""Softmax attention by cuDNN on NVIDIA GPUs, through JAX's own `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp

from pallas_kernels import target


def unsupported(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, q_start: jax.Array | None
) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.softmax_attention`), or None."""
    platform = target.target_platform()
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and this program is for {platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16: got {q.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"it takes heads of a size up to 128 that is a multiple of 8: got D = {q.shape[-1]}"
    if segment_ids is not None:
        return "it takes no segment_ids"
    if q_start is not None:
        return "it takes no q_start: its causal mask begins at the first key"
    return None if _is_ampere_or_later() else "it needs compute capability 8.0 or later"


def attention(q, k, v, segment_ids, q_start):
    """Shapes as in `api.softmax_attention`; o [B,T,Hq,D] in q's dtype."""
    del segment_ids, q_start
    length = q.shape[1]
    # cuDNN failed at odd lengths (seen on an H200). Tokens behind the end change nothing: no query sees them.
    behind = ((0, 0), (0, -length % 8), (0, 0), (0, 0))
    padded = (jnp.pad(x, behind) for x in (q, k, v))
    return jax.nn.dot_product_attention(*padded, is_causal=True, implementation="cudnn")[:, :length]


def _is_ampere_or_later() -> bool:
    """Of the GPU that is here; one that is only compiled for is taken to be."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return True
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return major.isdecimal() and int(major) >= 8  # AMD's read "gfx90a"
