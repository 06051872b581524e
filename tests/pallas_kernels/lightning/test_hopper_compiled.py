"""The Hopper kernels compiled for an H200 that is not here: they fit, and spill no register.

Tensors come and go as [B,T,H*D], the way a model's projections make and use them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import lightning_attention, lightning_attention_decode
from tests.pallas_kernels.h200 import MEMORY, compile_for_h200, h200_mesh, require_toolchain

directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def report(what, compiled, kernels, record_property):
    memory = compiled.memory_analysis()
    print(f"{what}: {memory.temp_size_in_bytes} B of temporaries")
    for kernel in kernels:
        print(
            f"    {kernel.registers} registers, {kernel.shared_memory} B of shared memory, {kernel.spilled} B spilled"
        )
        assert kernel.spilled == 0
        assert kernel.shared_memory <= 227 * 1024
    record_property("temporary_bytes", memory.temp_size_in_bytes)
    return memory


def check(record_property, tmp_path, direction, length, heads, size=128, packed=True, batch=1, parts=1):
    """Compiles the public op, or its gradients from given cotangents; checks and reports spills and temporaries."""
    state = ((batch, heads, size, size), "float32")
    flat = ((batch, length, heads * size), "bfloat16")

    def forward(q, k, v, log_decay, initial_state, segment_ids):
        options = {"initial_state": initial_state, "segment_ids": segment_ids if packed else None}
        q, k, v = (x.reshape(batch, length, heads, size) for x in (q, k, v))
        o, final_state = lightning_attention(q, k, v, log_decay, implementation="hopper", **options)
        return o.reshape(flat[0]), final_state

    def backward(q, k, v, log_decay, initial_state, segment_ids, do, d_final_state):
        def differentiable(q, k, v, initial_state):
            return forward(q, k, v, log_decay, initial_state, segment_ids)

        return jax.vjp(differentiable, q, k, v, initial_state)[1]((do, d_final_state))

    arguments = [flat, flat, flat, ((heads,), "float32"), state, ((batch, length), "int32")]
    if direction == "forward":
        compiled, kernels = compile_for_h200(forward, *arguments, dump=tmp_path)
    else:
        compiled, kernels = compile_for_h200(backward, *arguments, flat, state, dump=tmp_path)
    sums = parts > 1  # A kernel more for the states between parts: forward one, backward one each way.
    assert len(kernels) == {"forward": 1 + sums, "backward": 2 + 2 * sums}[direction]
    what = f"{direction} B={batch} T={length} H={heads} d={size}{' packed' if packed else ''}"
    memory = report(what, compiled, kernels, record_property)
    # Transposed states; of packed tokens 8 bytes each, and what it takes to find them: nothing of the size of q.
    allowed = 2 * batch * heads * size * size * 4 + packed * batch * (64 * length + (1 << 20)) + (1 << 20)
    tensor = batch * -(-length // 8) * 8 * heads * size * 2
    if parts > 1:
        allowed += 8 * parts * heads * size * size * 4
    if length % 8:
        allowed += tensor * {"forward": 4, "backward": 7}[direction]  # Copies with zeros behind.
    assert memory.temp_size_in_bytes <= allowed
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes < MEMORY


@directions
def test_a_million_tokens(record_property, tmp_path, direction):
    check(record_property, tmp_path, direction, 1 << 20, 64)


@directions
def test_two_rows_of_64_heads(record_property, tmp_path, direction):
    """Where a block takes a whole head."""
    check(record_property, tmp_path, direction, 32768, 64, batch=2)


@directions
def test_eight_heads_in_parts(record_property, tmp_path, direction):
    """As under tensor parallelism."""
    check(record_property, tmp_path, direction, 131072, 8, parts=8)


@directions
def test_head_size_64_and_a_length_that_needs_padding(record_property, tmp_path, direction):
    check(record_property, tmp_path, direction, 1001, 6, size=64, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1 << n for n in range(12, 20)])
@pytest.mark.parametrize("packed", [False, True])
@directions
def test_lengths(record_property, tmp_path, direction, packed, length):
    check(record_property, tmp_path, direction, length, 64, packed=packed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1, "heads": 1, "size": 64},
        {"length": 8, "heads": 1},
        {"length": 63, "heads": 6, "batch": 3},
        {"length": 4096, "heads": 6, "size": 64, "parts": 4},
        {"length": 32768, "heads": 32, "parts": 2},
        {"length": 4097, "heads": 64, "batch": 2},
        {"length": 32768, "heads": 64, "batch": 4},
    ],
    ids=lambda shape: "-".join(f"{name}{n}" for name, n in shape.items()),
)
@pytest.mark.parametrize("packed", [False, True])
@directions
def test_shapes(record_property, tmp_path, direction, packed, shape):
    check(record_property, tmp_path, direction, packed=packed, **shape)


@pytest.mark.parametrize("shape", [(1, 6, 64), (64, 64, 128)], ids=lambda s: "N{}-H{}-d{}".format(*s))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_updates_the_pool_in_place(record_property, tmp_path, dtype, shape):
    sequences, heads, size = shape
    token, pool = (shape, dtype), ((sequences + 1, heads, size, size), "float32")

    def decode(*arrays):
        return lightning_attention_decode(*arrays, implementation="hopper")

    arguments = [token] * 3 + [((heads,), "float32"), pool, ((sequences,), "int32")]
    compiled, kernels = compile_for_h200(decode, *arguments, dump=tmp_path, donate_argnums=4)
    assert len(kernels) == 1
    memory = report(f"decode {shape} {dtype}", compiled, kernels, record_property)
    assert memory.alias_size_in_bytes >= 4 * (sequences + 1) * heads * size * size
    assert memory.temp_size_in_bytes <= 1 << 20


def test_a_scan_over_layers_copies_no_states(record_property, tmp_path):
    """The states of all layers are one pool, which a loop carries; a layer's slots follow those of the one before."""
    layers, sequences, heads, size = 4, 64, 16, 128

    def step(q, log_decay, pool, slots):
        def layer(carry, index):
            q, pool = carry
            return lightning_attention_decode(q, q, q, log_decay, pool, slots + index * sequences), None

        return jax.lax.scan(layer, (q, pool), jnp.arange(layers, dtype=jnp.int32))[0]

    pool = ((layers * sequences, heads, size, size), "float32")
    arguments = [((sequences, heads, size), "bfloat16"), ((heads,), "float32"), pool, ((sequences,), "int32")]
    compiled, kernels = compile_for_h200(step, *arguments, dump=tmp_path, donate_argnums=2)
    memory = report("decode, layers in a scan", compiled, kernels, record_property)
    assert memory.temp_size_in_bytes <= 4 << 20
    # A copy of the pool inside the loop would need no memory beside it if it went through the result.
    assert not re.findall(r"= f32\[256,16,128,128\]\S* copy", compiled.as_text())


def test_the_best_is_chosen_by_itself(tmp_path):
    tokens = ((1, 256, 6, 128), "bfloat16")
    _, kernels = compile_for_h200(lightning_attention, tokens, tokens, tokens, ((6,), "float32"), dump=tmp_path)
    assert len(kernels) == 1


def test_float32_goes_to_the_portable_form(tmp_path):
    """Never silently to matrix units that would round it."""
    tokens = ((1, 256, 6, 128), jnp.float32)
    _, kernels = compile_for_h200(lightning_attention, tokens, tokens, tokens, ((6,), "float32"), dump=tmp_path)
    assert not kernels


def test_inside_shard_map(tmp_path):
    """Gradients, and decode, where every array differs between the devices of a mesh."""
    require_toolchain()
    mesh = h200_mesh()
    rows = PartitionSpec("chip")
    specs = (rows, rows, rows, PartitionSpec(), rows, rows)

    def loss(q, k, v, log_decay, initial_state, segment_ids):
        def local(q, k, v, log_decay, initial_state, segment_ids):
            states = {"initial_state": initial_state, "segment_ids": segment_ids}
            return lightning_attention(q, k, v, log_decay, implementation="hopper", **states)

        sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(rows, rows))
        o, state = sharded(q, k, v, log_decay, initial_state, segment_ids)
        return o.astype(jnp.float32).sum() + state.sum()

    tokens, state = ((2, 256, 4, 128), "bfloat16"), ((2, 4, 128, 128), "float32")
    arguments = [tokens] * 3 + [((4,), "float32"), state, ((2, 256), "int32")]
    gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 4))
    _, kernels = compile_for_h200(gradients, *arguments, dump=tmp_path)
    assert len(kernels) == 3

    heads = PartitionSpec(None, "chip")
    specs = (heads, heads, heads, PartitionSpec("chip"), heads, PartitionSpec())
    local = functools.partial(lightning_attention_decode, implementation="hopper")
    # JAX 0.12 takes no array into a kernel to be updated that is marked as differing between devices.
    decode = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(heads, heads), check_vma=False)
    token, pool = ((3, 4, 128), "bfloat16"), ((5, 4, 128, 128), "float32")
    arguments = [token] * 3 + [((4,), "float32"), pool, ((3,), "int32")]
    compiled, kernels = compile_for_h200(decode, *arguments, dump=tmp_path, donate_argnums=4)
    assert len(kernels) == 1
    assert compiled.memory_analysis().temp_size_in_bytes <= 1 << 20
