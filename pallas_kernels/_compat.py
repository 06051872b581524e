"""What differs between the supported versions of JAX."""

import jax

_OLD = jax.__version_info__ < (0, 11)


def varying_axes(*arrays: jax.Array | None) -> frozenset[str]:
    """The axes of the enclosing `shard_map` over which any of the arrays differs between devices."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Marks an array as differing over `axes`: `shard_map` demands it of a carry whose update differs."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def gpu_interpreter(interpret):
    """What `plgpu.kernel` wants to be told: the GPU interpreter's parameters, or None."""
    if interpret is not True:
        return interpret or None
    if _OLD:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    else:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    return InterpretGPUParams(detect_races=True)


def transposed(ref):
    """A matrix in a GPU's shared memory, its two axes exchanged."""
    if not _OLD:
        return ref.transpose((1, 0))
    from jax.experimental.pallas.mosaic_gpu import transpose_ref

    return transpose_ref(ref, (1, 0))


def load(ref, layout):
    """What a GPU's shared or global memory holds, in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.load(ref, *([()] if _OLD else []), layout=layout, optimized=False)
