"""How XLA compiles the large programs: what differs from its defaults, and why."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from m1jax.sharding import AXES, ambient_mesh
from pallas_kernels import target_platform

GPU_OPTIONS: dict[str, str | int | bool] = {
    # Products go to cuBLAS, which reads a layer's weights where they lie in their stack and writes its result into a
    # stack; Triton's products have both copied.
    "xla_gpu_enable_triton_gemm": False,
    # Two products of the same activations are not made one of weights copied side by side.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


EXCHANGE_OPTIONS: dict[str, str | int | bool] = {
    # By default XLA reckons how long an exchange takes from its bytes, and takes those of tokens with their experts for
    # so short that nothing need run meanwhile. With one time for all of them it lets kernels go on (two H200, m1-2b:
    # expert=2 207 ms for 211; but fsdp=2 213 for 207, data=2 209 for 206).
    "xla_gpu_enable_analytical_sol_latency_estimator": False,
    "xla_gpu_enable_latency_hiding_scheduler": True,
}

TPU_OPTIONS: dict[str, str | int | bool] = {
    # Sums over devices go behind the loop over micro-batches. Where all that there is to sum is small, since gradients
    # are cut as parameters are, XLA ends with a failed check (libtpu 0.0.42 and 0.0.50, `user->opcode() == kAdd`).
    "xla_disable_hlo_passes": "while-loop-all-reduce-code-motion",
}


def compiler_options() -> dict[str, str | int | bool] | None:
    """``compiler_options`` for a ``jax.jit`` of updates or of decoding, on the platform the program is meant for."""
    return GPU_OPTIONS if target_platform() == "gpu" else None


def update_options() -> dict[str, str | int | bool] | None:
    """``compiler_options`` of an update of training on the ambient mesh."""
    options, mesh, platform = compiler_options(), ambient_mesh(), target_platform()
    if mesh is None:
        return options
    data, fsdp, expert, _, sequence = (mesh.shape[axis] for axis in AXES)
    if platform == "tpu" and data * sequence == 1 < fsdp * expert:
        return TPU_OPTIONS
    return GPU_OPTIONS | EXCHANGE_OPTIONS if platform == "gpu" and fsdp == 1 < expert else options


class jit:
    """``jax.jit`` with ``compiler_options()``, for a module's functions: it asks for the platform at the first call.

    Takes ``jax.jit``'s keyword arguments.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self._function, self._options = function, options
        functools.update_wrapper(self, function)

    @functools.cached_property
    def _jitted(self) -> Any:
        return jax.jit(self._function, compiler_options=compiler_options(), **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As ``jax.jit``'s."""
        return self._jitted.lower(*args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """As ``jax.jit``'s. (``jax.eval_shape`` of a program with compiler options raises.)"""
        return self._jitted.eval_shape(*args, **kwargs)
