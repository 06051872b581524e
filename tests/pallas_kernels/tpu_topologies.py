"""Compiles programs for TPUs that this machine does not have: Mosaic and XLA really compile, and nothing runs.

What does not fit into VMEM or HBM fails here as it would on the chip.
"""

import contextlib
import importlib.metadata
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""A small slice of each kind of chip."""

# The compiler that belongs to each JAX: with another, memory figures are off threefold.
LIBTPU = {"0.10": "0.0.42", "0.12": "0.0.50"}


def require_libtpu():
    """Skips the calling test where the TPU compiler is missing, or another than this JAX's."""
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("compiling for TPU needs libtpu (make kernels-toolchain)")
    wanted = LIBTPU.get(".".join(jax.__version__.split(".")[:2]))
    if wanted is None or not version.startswith(wanted + "."):
        pytest.skip(f"libtpu {version} is not the one known to go with JAX {jax.__version__} (that is {wanted})")
    # Several processes may compile at once: no chip is there to be fought for.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def compile_for_tpu(function, *arguments: tuple[tuple[int, ...], str], chip: str, **jit_options):
    """The executable of `function` for one chip; arguments are (shape, dtype)."""
    require_libtpu()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[:1]
    mesh = Mesh(np.array(devices), ("chip",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere) for shape, dtype in arguments]
    with _no_compilation_cache(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells kernels which chip
        return jax.jit(function, **jit_options).lower(*structs).compile()


@contextlib.contextmanager
def _no_compilation_cache():
    """A program for a chip that is not here can be written to the persistent cache, but not read back."""
    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()
