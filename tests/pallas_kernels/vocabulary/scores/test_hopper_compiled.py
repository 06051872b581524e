"""The Hopper kernel compiled for an H200 that is not here: it fits, and spills no register."""

import functools

import pytest

from pallas_kernels import vocabulary_scores
from tests.pallas_kernels.h200 import compile_for_h200


@pytest.mark.parametrize("rows", [1, 256])
def test_compiles(record_property, tmp_path, rows):
    words, width = 32768, 2048
    op = functools.partial(vocabulary_scores, implementation="hopper")
    arguments = ((rows, width), "bfloat16"), ((words, width), "float32")
    compiled, (kernel,) = compile_for_h200(op, *arguments, dump=tmp_path)
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(f"{kernel.registers} registers, {kernel.shared_memory} B of shared memory, {kernel.spilled} B spilled")
    record_property("temporary_bytes", memory)
    assert kernel.spilled == 0
    assert kernel.shared_memory <= 227 * 1024
    # The scores before they are transposed; nothing of the size of the weight.
    assert memory <= 4 * words * max(rows, 64) + (1 << 21)
