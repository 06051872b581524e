"""The Hopper kernel compiled for an H200 that is not here: it fits, and spills no register."""

import functools

import pytest

from pallas_kernels import expert_routes
from tests.pallas_kernels.h200 import compile_for_h200


@pytest.mark.parametrize(("experts", "width"), [(16, 1024), (32, 6144), (64, 512)])
def test_compiles(record_property, tmp_path, experts, width):
    op = functools.partial(expert_routes, k=2, implementation="hopper")
    arguments = ((64, width), "bfloat16"), ((4, experts, width), "float32"), ((), "int32")
    compiled, (kernel,) = compile_for_h200(op, *arguments, dump=tmp_path)
    print(f"{kernel.registers} registers, {kernel.shared_memory} B of shared memory, {kernel.spilled} B spilled")
    record_property("registers", kernel.registers)
    assert kernel.spilled == 0
    assert compiled.memory_analysis().temp_size_in_bytes <= 1 << 16
