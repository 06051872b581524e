"""The Hopper kernel compiled for an H200 that is not here: it fits, and spills no register."""

import pytest

from pallas_kernels import Projection, project
from tests.pallas_kernels.h200 import compile_for_h200


@pytest.mark.parametrize("rows", [1, 64, 256])
@pytest.mark.parametrize(("width", "size"), [(1024, 64), (2048, 128)])
def test_compiles(record_property, tmp_path, rows, width, size):
    """What a lightning layer of 16 heads takes from its stacks, without copies."""
    layers, heads = 4, 16

    def op(x, qkv, gate, layer):
        several = [Projection(qkv, "silu", 3, size), Projection(gate, "sigmoid")]
        return project(x, several, layer, implementation="hopper")

    arguments = [(rows, width), (layers, 3 * heads * size, width), (layers, heads * size, width)]
    compiled, (kernel,) = compile_for_h200(
        op, *((shape, "bfloat16") for shape in arguments), ((), "int32"), dump=tmp_path
    )
    print(f"{kernel.registers} registers, {kernel.shared_memory} B of shared memory, {kernel.spilled} B spilled")
    record_property("registers", kernel.registers)
    assert kernel.spilled == 0
    assert kernel.shared_memory <= 227 * 1024
    assert compiled.memory_analysis().temp_size_in_bytes <= 1 << 16
