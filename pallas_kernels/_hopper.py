"""What the kernels for NVIDIA Hopper GPUs share (Pallas' Mosaic GPU dialect)."""

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import target

MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM): how many thread blocks that fill their shared memory run at once."""

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""How the matrix units want two-byte operands in shared memory."""

_KINDS = ("H100", "H200", "H800", "H20", "GH200")


def missing() -> str | None:
    """Why programs traced now will not run on a Hopper GPU, or None."""
    platform = target.target_platform()
    if platform != "gpu":
        return f"it needs an NVIDIA Hopper GPU, and this program is for {platform}"
    kind = target.device_kind()
    if not any(name in kind for name in _KINDS):
        return f"it needs an NVIDIA Hopper GPU, and this one is {kind!r}"
    return None
