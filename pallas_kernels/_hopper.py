"""What the kernels for NVIDIA Hopper GPUs share (Pallas' Mosaic GPU dialect)."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat

MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM): how many thread blocks that fill their shared memory run at once."""

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""How the matrix units want two-byte operands in shared memory."""

_KINDS = ("H100", "H200", "H800", "H20", "GH200")


def missing() -> str | None:
    """Why programs traced now will not run on a Hopper GPU, or None."""
    platform = _compat.target_platform()
    if platform != "gpu":
        return f"it needs an NVIDIA Hopper GPU, and this program is for {platform}"
    kind = _device_kind()
    if not any(name in kind for name in _KINDS):
        return f"it needs an NVIDIA Hopper GPU, and this one is {kind!r}"
    return None


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def interpreter(interpret):
    """What `plgpu.kernel` wants to be told: the GPU interpreter's parameters, or None."""
    if interpret is not True:
        return interpret or None
    if jax.__version_info__ < (0, 11):
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    else:
        InterpretGPUParams = plgpu.InterpretGPUParams
    return InterpretGPUParams(detect_races=True)


def transposed(ref):
    """A matrix in shared memory, its two axes exchanged."""
    return plgpu.transpose_ref(ref, (1, 0)) if jax.__version_info__ < (0, 11) else ref.transpose((1, 0))
