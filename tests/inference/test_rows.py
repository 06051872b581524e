"""What travels between host and device comes out as it went in, whoever reads it."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.inference.capacity import Capacity
from m1jax.inference.device import Decoded
from m1jax.inference.rows import Prompts, Rows, pack_decoded, unpack_decoded
from m1jax.inference.scheduler import Chunk

CAPACITY = Capacity(
    rows=3, max_length=40, page_size=4, pages=14, snapshots=3, steps=3, decode=(1, 3), prefill=((1, 3), (2, 8)), stall=8
)


def test_rows_are_the_same_on_the_host_and_the_device():
    packed = Rows.at_rest(3, CAPACITY)
    rows = Rows.of(packed)
    assert rows.pages.shape == (3, 10)
    assert not rows.allowances.any() and (rows.slots == -1).all()
    rng = np.random.default_rng(0)
    for view in rows:  # views of one array: what is written here is there
        view[:] = rng.random(view.shape) if view.dtype == np.float32 else rng.integers(0, 2**31 - 1, view.shape)
    read = jax.jit(Rows.of)(jnp.asarray(packed))
    for name, mine, theirs in zip(Rows._fields, rows, read):
        assert mine.dtype == theirs.dtype, name
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_what_was_decoded_is_the_same_on_the_host():
    rng = np.random.default_rng(0)
    integers = [jnp.asarray(rng.integers(0, 1000, 2), jnp.int32) for _ in range(3)]
    logp, nucleus = (jnp.asarray(rng.normal(size=(2, 3)), jnp.float32) for _ in range(2))
    out = Decoded(integers[0], jnp.arange(6).reshape(2, 3), logp, nucleus.at[0, 1].set(jnp.nan), *integers[1:], None)
    found = unpack_decoded(np.asarray(jax.jit(pack_decoded)(out)))
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(out))


def test_chunks_lie_in_their_places():
    running = types.SimpleNamespace(tokens=list(range(100, 110)), computed=4, slot=2, pages=[7, 9])
    chunk = Chunk(running, 5)  # pyright: ignore[reportArgumentType]
    packed = Prompts.packed((2, 8), [chunk], [1], CAPACITY)
    counts, lengths, slots, tokens, pages = Prompts.of(packed, 8)
    assert (counts.tolist(), lengths.tolist(), slots.tolist()) == ([0, 5], [0, 4], [-1, 2])
    assert tokens[1].tolist() == [104, 105, 106, 107, 108, 0, 0, 0]
    assert pages[1].tolist() == [7, 9] + [-1] * 8
