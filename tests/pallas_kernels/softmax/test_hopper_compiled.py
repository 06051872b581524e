"""The Hopper kernels compiled for an H200 that is not here: they fit, and spill no register.

Tensors come and go as [B,T,H*D], the way a model's projections make and use them.
"""

import jax
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import softmax_attention
from tests.pallas_kernels.h200 import compile_for_h200, h200_mesh, require_toolchain

directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def check(
    record_property, tmp_path, direction, length, heads=16, kv_heads=4, size=128, where="packed", batch=1, keys=None
):
    """Compiles the public op, or its gradients; checks and reports spills and temporaries."""
    keys = keys or length
    queries, keys = ((batch, length, heads * size), "bfloat16"), ((batch, keys, kv_heads * size), "bfloat16")

    def forward(q, k, v, segment_ids, q_start):
        q, k, v = (x.reshape(*x.shape[:2], -1, size) for x in (q, k, v))
        place = {"packed": {"segment_ids": segment_ids}, "cache": {"q_start": q_start}, "one": {}}[where]
        return softmax_attention(q, k, v, implementation="hopper", **place).reshape(queries[0])

    def backward(q, k, v, segment_ids, q_start, do):
        return jax.vjp(lambda q, k, v: forward(q, k, v, segment_ids, q_start), q, k, v)[1](do)

    arguments = [queries, keys, keys, ((batch, length), "int32"), ((batch,), "int32")]
    if direction == "forward":
        compiled, kernels = compile_for_h200(forward, *arguments, dump=tmp_path)
    else:
        compiled, kernels = compile_for_h200(backward, *arguments, queries, dump=tmp_path)
    assert len(kernels) == {"forward": 1, "backward": 3}[direction]
    memory = compiled.memory_analysis()
    print(f"{direction} T={length} H={heads}x{kv_heads} d={size} {where}: {memory.temp_size_in_bytes} B of temporaries")
    for kernel in kernels:
        print(
            f"    {kernel.registers} registers, {kernel.shared_memory} B of shared memory, {kernel.spilled} B spilled"
        )
        assert kernel.spilled == 0
        assert kernel.shared_memory <= 227 * 1024
    record_property("temporary_bytes", memory.temp_size_in_bytes)
    tensor = batch * -(-length // 8) * 8 * heads * size * 2
    # Forward two, backward five numbers of float32 for each query and head, and a few for each token.
    allowed = batch * length * (20 * heads + 64) + (1 << 20) + (0 if direction == "forward" else tensor)
    if length % 8:
        allowed += 4 * tensor  # Copies with zeros behind.
    assert memory.temp_size_in_bytes <= allowed


@directions
def test_packed(record_property, tmp_path, direction):
    check(record_property, tmp_path, direction, 32768)


@directions
def test_a_cache(record_property, tmp_path, direction):
    check(record_property, tmp_path, direction, 1000, where="cache", keys=65536, batch=2)


@directions
def test_small_heads(record_property, tmp_path, direction):
    check(record_property, tmp_path, direction, 4096, heads=8, kv_heads=8, size=64, where="one", batch=2)


@pytest.mark.parametrize("check_vma", [False, True])
def test_within_a_shard_map(tmp_path, check_vma):
    """Where arrays are marked as differing between devices."""
    require_toolchain()
    rows = PartitionSpec("chip")

    def local(q, k, v, segment_ids):
        return softmax_attention(q, k, v, segment_ids=segment_ids, implementation="hopper")

    spread = jax.shard_map(local, mesh=h200_mesh(), in_specs=(rows,) * 4, out_specs=rows, check_vma=check_vma)

    def gradients(q, k, v, segment_ids, do):
        return jax.vjp(lambda q, k, v: spread(q, k, v, segment_ids), q, k, v)[1](do)

    length = 384 if check_vma else 256  # else both are one program, and JAX has compiled it
    queries, keys = (((2, length, heads, 64), "bfloat16") for heads in (4, 2))
    _, kernels = compile_for_h200(gradients, queries, keys, keys, ((2, length), "int32"), queries, dump=tmp_path)
    assert len(kernels) == 3
