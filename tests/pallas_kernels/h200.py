"""Compiles programs for an NVIDIA H200 that this machine does not have: ptxas really compiles, and nothing runs.

What does not fit into shared memory fails here as it would on the chip; what spills registers shows in ptxas' report.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import pathlib
import re

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H200"
"""
"""What XLA asks a driver about the chip."""

MEMORY = 141e9
"""Bytes on the card."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel."""

    registers: int
    shared_memory: int
    """Bytes per block, taken at launch."""
    spilled: int
    """Bytes of registers that go through memory."""


def require_toolchain():
    """Skips the calling test where what compiles for an H200 is missing, or goes with another JAX."""
    for package in ("jax-cuda12-plugin", "jax-cuda12-pjrt"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"compiling for H200 needs {package} (make kernels-toolchain)")
        if version != jax.__version__:
            pytest.skip(f"{package} is {version}, but JAX is {jax.__version__} (make kernels-toolchain)")
    if importlib.util.find_spec("nvidia.cuda_nvcc") is None:
        pytest.skip("compiling for H200 needs nvidia-cuda-nvcc-cu12 (make kernels-toolchain)")


def h200_mesh(chips: int = 1) -> Mesh:
    """So many of one host, their axis named "chip"."""
    return _mesh(chips)


@functools.cache
def _mesh(chips: int) -> Mesh:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{chips}")
    return topologies.make_mesh(topology, (chips,), ("chip",))


def compile_for_h200(
    function, *arguments: tuple[tuple[int, ...], str], dump: pathlib.Path, chips: int = 1, **jit_options
):
    """The executable of `function` for H200, and its Pallas kernels; arguments are (shape, dtype), whole on each.

    dump: an empty directory, for the compiler's reports.
    """
    require_toolchain()
    mesh = h200_mesh(chips)
    structs = [jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, PartitionSpec())) for x in arguments]
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        patch.setenv("MOSAIC_GPU_DUMP_TO", str(dump))
        patch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
        # The mesh tells kernels which chip they are for. The tests' own level (conftest.py) is for the CPU.
        lowered = jax.jit(function, **jit_options).lower(*structs)
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 3})
    kernels = [_kernel(report) for report in sorted(dump.glob("*.ptxas"))]
    for file in dump.iterdir():  # Tens of megabytes each.
        file.unlink()
    return compiled, kernels


def _kernel(report: pathlib.Path) -> Kernel:
    text = report.read_text()
    registers = re.search(r"Used (\d+) registers", text)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    # The number at the end of a file's name is not always the same for the files of one kernel.
    name = report.stem.rpartition("_")[0]
    resources = list(report.parent.glob(f"{name}_*.resources.txt"))
    if resources:
        shared_memory = re.search(r"smem_scratch_bytes=(\d+)", resources[0].read_text())
    else:
        launch = report.with_suffix(".mlir-passes.log").read_text()
        shared_memory = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", launch)
    assert registers and shared_memory and spilled, f"{report} reads unlike what this test knows"
    return Kernel(int(registers[1]), int(shared_memory[1]), max(map(int, spilled)))
