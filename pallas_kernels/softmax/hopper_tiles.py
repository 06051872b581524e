"""Which pairs of a tile of queries and a tile of keys the Hopper kernels visit, and which need a mask."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TILE = 128
"""Queries, or keys, of a thread block: 64 for each of its two warpgroups that compute."""
HALF = 64
FAR = 2**30
"""A place behind every token."""
LOG2_E = math.log2(math.e)
"""exp(x) = 2^(LOG2_E x), and the chip has the latter."""
FLOOR = -1e30
"""Start of a running maximum: finite, so that a query that has seen nothing yet gives exp(-inf) = 0, not NaN."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("first", "last", "offset"), meta_fields=("keys",))
@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the queries of each row see: query t the keys first[t] ... offset + t, as far as there are any.

    first: [B,T'] int32, the first key that each query sees, never going down; FAR for none. T' is T filled up to whole
        tiles, like S'.
    last: [B,S'] int32, never going down: no query behind last[j] sees key j. -1 for none.
    offset: [B] int32, the last key that each row's first query sees.
    keys: S, how many there are.
    """

    first: jax.Array
    last: jax.Array
    offset: jax.Array
    keys: int


class Walk(NamedTuple):
    """The blocks that a tile visits: [begin, end). Those of [open_begin, open_end), which need no mask, come first."""

    begin: jax.Array
    open_begin: jax.Array
    open_end: jax.Array
    end: jax.Array

    @property
    def open(self):
        """How many blocks need no mask."""
        return self.open_end - self.open_begin

    @property
    def masked(self):
        """How many need one."""
        return self.end - self.begin - self.open

    def at(self, step):
        """The block visited in that step."""
        rest = step - self.open
        before = self.open_begin - self.begin
        masked = jnp.where(rest < before, self.begin + rest, self.open_end + rest - before)
        return jnp.where(step < self.open, self.open_begin + step, masked)


def _walk(begin, open_begin, open_end, end) -> Walk:
    end = jnp.maximum(begin, end)
    open_begin = jnp.clip(open_begin, begin, end)
    return Walk(begin, open_begin, jnp.clip(open_end, open_begin, end), end)


def _div(a, b: int):
    """Rounded down; a >= 0."""
    return lax.div(a, jnp.int32(b))


def key_walk(bounds_refs, row, tile, keys: int, block: int) -> Walk:
    """The blocks of keys that the queries of a tile see. Scalars from memory: Bounds' arrays are references here."""
    first_ref, _, offset_ref = bounds_refs
    query = tile * TILE
    lowest, highest = first_ref[row, query], first_ref[row, query + TILE - 1]
    diagonal = query + offset_ref[row]
    end = jnp.where(lowest == FAR, 0, jnp.minimum(diagonal + TILE, keys))
    return _walk(
        jnp.where(lowest == FAR, 0, _div(lowest, block)),
        _div(highest + block - 1, block),
        _div(jnp.minimum(diagonal + 1, keys), block),
        _div(end + block - 1, block),
    )


def query_walk(bounds_refs, row, tile, block: int) -> Walk:
    """The blocks of queries that see keys of a tile."""
    _, last_ref, offset_ref = bounds_refs
    key = tile * TILE
    lowest, highest = last_ref[row, key], last_ref[row, key + TILE - 1]
    diagonal = jnp.maximum(key - offset_ref[row], 0)
    whole = jnp.maximum(key + TILE - 1 - offset_ref[row], 0)
    return _walk(
        _div(diagonal, block),
        _div(whole + block - 1, block),
        _div(lowest + 1, block),
        _div(highest + block, block),
    )
