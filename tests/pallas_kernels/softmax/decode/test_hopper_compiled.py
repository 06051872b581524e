"""The Hopper kernel compiled for an H200 that is not here: it is what "auto" takes, it fits, and nothing spills."""

import jax
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import softmax_attention_decode
from tests.pallas_kernels.h200 import compile_for_h200, h200_mesh, require_toolchain


def arguments(batch, heads, kv_heads, size, page_size, n, dtype="bfloat16"):
    pool = ((batch * n, page_size, kv_heads, size), dtype)
    return [((batch, heads, size), dtype), pool, pool, ((batch, n), "int32"), ((batch,), "int32")]


@pytest.mark.parametrize(
    "shape",
    [(64, 64, 8, 128, 256, 32), (1, 64, 8, 128, 1 << 20, 1), (256, 6, 6, 64, 64, 8)],
    ids=["64 of 8k", "one of 1M", "256 of 512"],
)
def test_compiles(tmp_path, record_property, shape):
    compiled, kernels = compile_for_h200(softmax_attention_decode, *arguments(*shape), dump=tmp_path)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"{temporaries} B of temporaries", *kernels, sep="\n    ")
    record_property("temporary_bytes", temporaries)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.spilled == 0
        assert kernel.shared_memory <= 227 * 1024
    # The queries filled up to 64 rows a head, and the pieces' sums; nothing that grows with the length.
    batch, heads, kv_heads, size, *_ = shape
    assert temporaries <= 2 * (132 + batch * kv_heads) * 64 * size * 4 + (1 << 20)


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"page_size": 48}])
def test_what_it_does_not_take_goes_to_the_portable_form(tmp_path, changes):
    usual = dict(batch=2, heads=4, kv_heads=2, size=64, page_size=64, n=2)
    _, kernels = compile_for_h200(softmax_attention_decode, *arguments(**usual | changes), dump=tmp_path)
    assert not kernels


def test_inside_shard_map(tmp_path):
    require_toolchain()
    rows, pool = PartitionSpec("chip"), PartitionSpec("chip")

    def op(*arrays):
        sharded = jax.shard_map(
            lambda *arrays: softmax_attention_decode(*arrays, implementation="hopper"),
            mesh=h200_mesh(),
            in_specs=(rows, pool, pool, rows, rows),
            out_specs=rows,
        )
        return sharded(*arrays)

    _, kernels = compile_for_h200(op, *arguments(4, 4, 2, 64, 128, 2), dump=tmp_path)
    assert len(kernels) == 2
