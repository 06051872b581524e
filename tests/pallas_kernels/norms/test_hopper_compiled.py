"""The Hopper kernel compiled for an H200 that is not here: it fits, and spills no register."""

import pytest

from pallas_kernels import Norm, normed
from tests.pallas_kernels.h200 import compile_for_h200


@pytest.mark.parametrize("width", [1024, 8192])
def test_compiles(record_property, tmp_path, width):
    def op(x, out, weights, layer):
        return normed([(x, 3.5), (out, 1.25)], Norm(weights, 1e-5), layer, gate=out, implementation="hopper")

    token = ((64, width), "bfloat16")
    compiled, (kernel,) = compile_for_h200(op, token, token, ((4, width), "bfloat16"), ((), "int32"), dump=tmp_path)
    print(f"{kernel.registers} registers, {kernel.shared_memory} B of shared memory, {kernel.spilled} B spilled")
    record_property("registers", kernel.registers)
    assert kernel.spilled == 0
    assert compiled.memory_analysis().temp_size_in_bytes <= 1 << 16
