"""The Hopper kernel compiled for an H200 that is not here: it fits, and spills no register."""

import functools

import jax
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import vocabulary_statistics
from tests.pallas_kernels.h200 import compile_for_h200, h200_mesh, require_toolchain


def op(hidden, weight, targets, keep_scores=False):
    return vocabulary_statistics(hidden, weight, targets, scale=0.5, keep_scores=keep_scores, implementation="hopper")


@pytest.mark.parametrize(("words", "keep_scores"), [(32768, False), (32001, False), (32768, True)])
def test_compiles(record_property, tmp_path, words, keep_scores):
    tokens, width = 32768, 2048
    arguments = ((tokens, width), "bfloat16"), ((words, width), "float32"), ((tokens,), "int32")
    compiled, (kernel,) = compile_for_h200(functools.partial(op, keep_scores=keep_scores), *arguments, dump=tmp_path)
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(f"{kernel.registers} registers, {kernel.shared_memory} B of shared memory, {kernel.spilled} B spilled")
    record_property("temporary_bytes", memory)
    assert kernel.spilled == 0
    assert kernel.shared_memory <= 227 * 1024
    # The weight and the hidden states in float16, and 16 bytes a token and part; scores that are kept are no temporary.
    assert memory <= 4 * (words + 8) * width + 2 * tokens * width + 16 * 8 * tokens + (1 << 22)


def test_compiles_within_a_shard_map(tmp_path):
    """Where arrays are marked as differing between devices."""
    require_toolchain()

    def local(hidden, weight, targets):
        return op(hidden, weight, targets)[0].together("chip")

    spread = jax.shard_map(local, mesh=h200_mesh(), in_specs=(P(), P("chip"), P()), out_specs=P())
    compile_for_h200(spread, ((256, 512), "bfloat16"), ((1024, 512), "float32"), ((256,), "int32"), dump=tmp_path)
