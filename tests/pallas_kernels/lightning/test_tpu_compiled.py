"""The TPU kernels compiled for chips that are not here: they fit, and take no memory beside arguments and results.

Tensors come and go as [B,T,H*D], the way a model's projections make and use them.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lightning_attention, lightning_attention_decode
from tests.pallas_kernels.tpu_topologies import TOPOLOGIES, compile_for_tpu

# Heads of size 128 whose forward and backward at a million tokens the chip's memory holds.
HEADS = {"v5e": 4, "v5p": 16, "v6e": 8, "tpu7x": 16}

chips = pytest.mark.parametrize("chip", TOPOLOGIES)
directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def check(record_property, chip, direction, length, heads, size=128, dtype="bfloat16", packed=True, batch=1):
    """Compiles the public op, or its gradients from given cotangents; checks the temporaries and reports them."""
    state = ((batch, heads, size, size), "float32")
    flat = ((batch, length, heads * size), dtype)

    def forward(q, k, v, log_decay, initial_state, segment_ids):
        split = (batch, length, heads, size)
        ids = segment_ids if packed else None
        o, final_state = lightning_attention(
            q.reshape(split),
            k.reshape(split),
            v.reshape(split),
            log_decay,
            initial_state=initial_state,
            segment_ids=ids,
        )
        return o.reshape(q.shape), final_state

    def backward(q, k, v, log_decay, initial_state, segment_ids, do, d_final_state):
        def differentiable(q, k, v, initial_state):
            return forward(q, k, v, log_decay, initial_state, segment_ids)

        return jax.vjp(differentiable, q, k, v, initial_state)[1]((do, d_final_state))

    arguments = [flat, flat, flat, ((heads,), "float32"), state, ((batch, length), "int32")]
    if direction == "forward":
        compiled = compile_for_tpu(forward, *arguments, chip=chip)
    else:
        compiled = compile_for_tpu(backward, *arguments, flat, state, chip=chip)
    kernels = {"forward": 1, "backward": 2}[direction]
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    memory = compiled.memory_analysis()
    print(f"{chip} {direction} T={length} H={heads} d={size} {dtype}: {memory.temp_size_in_bytes} B of temporaries")
    record_property("temporary_bytes", memory.temp_size_in_bytes)
    # Segment ids once more, their summaries, the states transposed for dq, and copies of what is tiny: never q's size.
    allowed = 2 * batch * (length * 4 + heads * size * max(size, 128) * 4) + (1 << 20)
    if width := -heads * size % 128:
        # XLA fills lanes better with time than with these channels, so it stores the program's own arguments and
        # results that way and copies them to and from rows of channels. Inside a model no program begins here.
        tensors = {"forward": 4, "backward": 7}[direction]
        allowed += tensors * batch * length * (heads * size + width) * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes <= allowed


@chips
@directions
def test_a_million_tokens(record_property, chip, direction):
    check(record_property, chip, direction, 1 << 20, HEADS[chip])


@pytest.mark.slow
@pytest.mark.parametrize("length", [4097, *(1 << n for n in range(12, 20))])
@chips
@directions
def test_lengths(record_property, chip, direction, length):
    check(record_property, chip, direction, length, HEADS[chip], packed=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1, "heads": 1, "size": 64},
        {"length": 63, "heads": 6, "size": 128, "batch": 3},
        {"length": 1000, "heads": 3, "size": 64},
        # A multiple of 8: else XLA may give the program's own arguments a layout that has to be copied from.
        {"length": 4104, "heads": 64, "size": 128, "batch": 2},
        {"length": 32768, "heads": 64, "size": 128},
        {"length": 32768, "heads": 16, "size": 64},
    ],
    ids=lambda shape: "-".join(f"{name}{n}" for name, n in shape.items()),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@chips
@directions
def test_shapes(record_property, chip, direction, dtype, shape):
    check(record_property, chip, direction, dtype=dtype, **shape)


@chips
@pytest.mark.parametrize("shape", [(1, 6, 64), (64, 64, 128), (256, 8, 128)], ids=lambda s: "N{}-H{}-d{}".format(*s))
def test_decode_updates_the_pool_in_place(record_property, chip, shape):
    sequences, heads, size = shape
    token, pool = (shape, "bfloat16"), ((sequences + 1, heads, size, size), "float32")
    arguments = [token] * 3 + [((heads,), "float32"), pool, ((sequences,), "int32")]
    compiled = compile_for_tpu(lightning_attention_decode, *arguments, chip=chip, donate_argnums=4)
    assert 'custom_call_target="tpu_custom_call"' in compiled.as_text()
    memory = compiled.memory_analysis()
    print(f"{chip} decode {shape}: {memory.temp_size_in_bytes} B of temporaries")
    record_property("temporary_bytes", memory.temp_size_in_bytes)
    assert memory.alias_size_in_bytes >= 4 * (sequences + 1) * heads * size * size
    assert memory.temp_size_in_bytes <= 1 << 20


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    """Else the tests above would show nothing: 64 heads of a million tokens take 67 GB on a chip of 16."""
    tokens = ((1, 1 << 20, 64, 128), jnp.bfloat16)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)hbm|memory"):
        compile_for_tpu(lightning_attention, tokens, tokens, tokens, ((64,), jnp.float32), chip="v5e")
