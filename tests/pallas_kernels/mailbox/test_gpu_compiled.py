"""The kernels compile for an H200: the assembler takes their text."""

import jax
import pytest

from pallas_kernels.mailbox import Layout, gpu
from tests.pallas_kernels.h200 import compile_for_h200


@pytest.mark.parametrize("layout", [Layout(1, 10), Layout(32, 6252)], ids=str)
def test_compiles(layout, tmp_path):
    def talk(address, number, asks, words, after):
        def step(i, carry):
            words, after = carry
            answer = gpu.ask(address, number[0] + i, asks != 0, after, layout)
            return gpu.tell(address, number[0] + i, words + answer[:, 0].astype("int32"), layout), after * 2

        return jax.lax.fori_loop(0, 4, step, (words, after))

    rows = (layout.rows,)
    arguments = [((2,), "uint32"), ((1,), "int32"), (rows, "int32"), (rows, "int32"), ((4, 4), "float32")]
    compiled, kernels = compile_for_h200(talk, *arguments, dump=tmp_path)
    assert "ask" in compiled.as_text()
    assert "tell" in compiled.as_text()
    assert [kernel.spilled for kernel in kernels] == [0, 0]
