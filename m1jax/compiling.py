"""How XLA compiles the large programs: what differs from its defaults, and why."""

from pallas_kernels import target_platform

GPU_OPTIONS: dict[str, str | int | bool] = {
    # Products go to cuBLAS, which reads a layer's weights where they lie in their stack and writes its result into a
    # stack; Triton's products have both copied.
    "xla_gpu_enable_triton_gemm": False,
    # Two products of the same activations are not made one of weights copied side by side.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def compiler_options() -> dict[str, str | int | bool] | None:
    """``compiler_options`` for a ``jax.jit`` of updates or of decoding, on the platform the program is meant for."""
    return GPU_OPTIONS if target_platform() == "gpu" else None
