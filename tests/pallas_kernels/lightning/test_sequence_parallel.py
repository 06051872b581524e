"""A row split between devices gives what one device gives, and what they exchange does not grow with it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import PADDING
from pallas_kernels.lightning import lightning_attention, lightning_attention_sequence_parallel
from tests.pallas_kernels.lightning.suite import NAMES, assert_close

HEADS, KEY_SIZE, VALUE_SIZE = 3, 16, 32
LOG_DECAY = -np.array([0.7, 0.02, 1e-4], np.float32)
TOKENS = P(None, "sequence")


def sharded(devices, check_vma=True):
    mesh = jax.make_mesh((devices,), ("sequence",), axis_types=(AxisType.Auto,))

    def op(q, k, v, initial_state, segment_ids):
        def local(q, k, v, initial_state, segment_ids):
            return lightning_attention_sequence_parallel(
                q, k, v, LOG_DECAY, axis_name="sequence", initial_state=initial_state, segment_ids=segment_ids
            )

        specs = (*(TOKENS,) * 3, P(), TOKENS)
        out_specs = (TOKENS, P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma)(
            q, k, v, initial_state, segment_ids
        )

    return op


def whole(q, k, v, initial_state, segment_ids):
    return lightning_attention(q, k, v, LOG_DECAY, initial_state=initial_state, segment_ids=segment_ids)


def with_gradients(op, q, k, v, initial_state, segment_ids, do, d_final_state):
    outputs, transposed = jax.vjp(lambda *x: op(*x, segment_ids), q, k, v, initial_state)
    return *outputs, *transposed((do, d_final_state))


def arrays(batch, length):
    keys = jax.random.split(jax.random.key(0), 6)
    state = (batch, HEADS, KEY_SIZE, VALUE_SIZE)
    q, k = (jax.random.normal(key, (batch, length, HEADS, KEY_SIZE)) for key in keys[:2])
    v, do = (jax.random.normal(key, (batch, length, HEADS, VALUE_SIZE)) for key in keys[2:4])
    return q, k, v, jax.random.normal(keys[4], state), do, jax.random.normal(keys[5], state)


def rows_of_segments(length):
    """Resets nowhere, inside shards and at their borders; padding over nothing, a part, whole shards, the whole row."""
    ids = np.zeros((6, length), np.int32)
    ids[1, length // 8 :] = 4
    ids[2, length // 2 + 1 :] = 2
    ids[2, 3 * length // 4 - 3 :] = PADDING
    ids[3] = np.arange(length) // 7
    ids[4, length // 3 :] = PADDING
    ids[5] = PADDING
    return jnp.asarray(ids)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_one_device(devices, packed):
    length = 320
    q, k, v, initial_state, do, d_final_state = arrays(6 if packed else 1, length)
    segment_ids = rows_of_segments(length) if packed else None
    results, truths = (
        jax.jit(lambda *x, op=op: with_gradients(op, *x))(q, k, v, initial_state, segment_ids, do, d_final_state)
        for op in (sharded(devices), whole)
    )
    for name, result, truth in zip(NAMES, results, truths, strict=True):
        # Row by row: one must not hide behind another.
        for row in range(len(q)):
            assert_close(name, result[row : row + 1], np.asarray(truth[row : row + 1], np.float64), 1e-5)


def test_without_checking_of_varying_axes():
    q, k, v, initial_state, do, d_final_state = arrays(1, 64)
    results, truths = (
        jax.jit(lambda *x, op=op: with_gradients(op, *x))(q, k, v, initial_state, None, do, d_final_state)
        for op in (sharded(4, check_vma=False), whole)
    )
    for name, result, truth in zip(NAMES, results, truths, strict=True):
        assert_close(name, result, np.asarray(truth, np.float64), 1e-5)


COLLECTIVE = re.compile(r"= (.*?) (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(?:-start)?\(")


def exchanged(program):
    """The kind and shape of each collective of a compiled program."""
    return sorted((kind, re.sub(r"\{.*?\}", "", shape)) for shape, kind in COLLECTIVE.findall(program))


def compiled(op, length, packed, gradients):
    q, k, v, initial_state, do, d_final_state = arrays(1, length)
    segment_ids = rows_of_segments(length)[1:2] if packed else None
    if gradients:
        # As in training: from a loss on the output, for q, k and v.
        def function(q, k, v):
            return jax.vjp(lambda *x: op(*x, None, segment_ids)[0], q, k, v)[1](do)

        return exchanged(jax.jit(function).lower(q, k, v).compile().as_text())
    return exchanged(jax.jit(op).lower(q, k, v, initial_state, segment_ids).compile().as_text())


def test_exchanges_one_state_per_device_whatever_the_length():
    op, states = sharded(4), f"f32[4,1,{HEADS},{KEY_SIZE},{VALUE_SIZE}]"
    ids = [("all-gather", "s32[3,4,1]")]
    for packed in (False, True):
        forward = compiled(op, 64, packed, gradients=False)
        assert forward == [("all-gather", states)] + ids * packed
        assert compiled(op, 4096, packed, gradients=False) == forward
    forward_and_backward = compiled(op, 64, False, gradients=True)
    assert forward_and_backward == [("all-gather", states), ("reduce-scatter", states.replace("[4,", "[1,"))]
    assert compiled(op, 4096, False, gradients=True) == forward_and_backward
