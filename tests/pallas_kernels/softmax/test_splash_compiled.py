"""Splash attention compiled for TPUs that are not here: it is what "auto" takes, it fits, and memory is linear in T."""

import jax
import pytest

from pallas_kernels import softmax_attention
from tests.pallas_kernels.tpu_topologies import TOPOLOGIES, compile_for_tpu

HEADS, KV_HEADS, SIZE = 8, 1, 128


def check(record_property, chip, direction, length, packed=True):
    """Tensors come and go as [B,T,H*D], the way a model's projections make and use them."""

    def forward(q, k, v, segment_ids):
        q, k, v = (x.reshape(1, length, -1, SIZE) for x in (q, k, v))
        return softmax_attention(q, k, v, segment_ids=segment_ids if packed else None).reshape(1, length, -1)

    def backward(q, k, v, segment_ids, do):
        return jax.vjp(lambda q, k, v: forward(q, k, v, segment_ids), q, k, v)[1](do)

    queries, keys = (((1, length, n * SIZE), "bfloat16") for n in (HEADS, KV_HEADS))
    arguments = [queries, keys, keys, ((1, length), "int32")]
    if direction == "forward":
        compiled = compile_for_tpu(forward, *arguments, chip=chip)
    else:
        compiled = compile_for_tpu(backward, *arguments, queries, chip=chip)
    kernels = {"forward": 1, "backward": 3}[direction]
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"{chip} {direction} T={length}: {temporaries} B of temporaries")
    record_property("temporary_bytes", temporaries)
    # Tensors with heads before time, and sums in float32 that the kernels store 128 times over: 4 bytes x 128 per row.
    assert temporaries <= {"forward": 5, "backward": 10}[direction] * 2 * length * HEADS * SIZE + (8 << 20)


directions = pytest.mark.parametrize("direction", ["forward", "backward"])


@directions
def test_compiles(record_property, direction):
    check(record_property, "v5e", direction, 8192)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1000, 32768, 131072, 262144])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chip", TOPOLOGIES)
@directions
def test_lengths(record_property, chip, direction, length, packed):
    check(record_property, chip, direction, length, packed)
