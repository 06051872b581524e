"""What the TPU scans share: how tensors are cut into blocks, and the weights of a chunk.

[B,T,H,D] is read as [B,T,H*D], which is what a projection produces. A *tile* is 128 lanes of it: one head of size 128,
or two of size 64, whose states then share one block-diagonal matrix. No tensor is transposed or gathered.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning.segments import PADDING, is_real

CHUNK = 128
"""Tokens per step of the recurrence. A token costs C in each product inside the chunk, D in those with the state."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How [B,T,H,D] is cut: a grid of batch x lane blocks x time blocks, the last walked in order."""

    batch: int
    length: int
    heads: int
    size: int
    dtype: Any

    @classmethod
    def of(cls, q: jax.Array) -> "Blocks":
        batch, length, heads, size = q.shape
        return cls(batch, length, heads, size, q.dtype)

    @property
    def tile(self) -> int:
        """Lanes that are multiplied at once."""
        return min(128, self.heads * self.size)

    @property
    def heads_per_tile(self) -> int:
        return self.tile // self.size

    @property
    def lanes(self) -> int:
        """Lanes per block: several independent heads keep the matrix units busy while one waits for its state.

        Two blocks at least where there are heads enough: a v5p shares them between its two cores.
        """
        whole = self.heads * self.size
        wide = [n for n in (512, 256) if whole % n == 0 and self.batch * whole >= 2 * n]
        return wide[0] if wide else self.tile

    @property
    def tiles(self) -> int:
        return self.lanes // self.tile

    @property
    def heads_per_block(self) -> int:
        return self.lanes // self.size

    @property
    def lane_blocks(self) -> int:
        return pl.cdiv(self.heads * self.size, self.lanes)

    @property
    def tokens(self) -> int:
        """Tokens per block."""
        whole = pl.cdiv(self.length, CHUNK) * CHUNK
        return min(whole, 512 if self.dtype == jnp.bfloat16 else 256)

    @property
    def time_blocks(self) -> int:
        return pl.cdiv(self.length, self.tokens)

    @property
    def chunks(self) -> int:
        """Chunks per block."""
        return self.tokens // CHUNK

    @property
    def is_ragged(self) -> bool:
        """Whether some block reaches beyond the arrays, where it reads what happens to be there."""
        return self.length % self.tokens != 0 or self.heads % self.heads_per_tile != 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.lane_blocks, self.time_blocks

    def time(self, step, reverse: bool):
        return self.time_blocks - 1 - step if reverse else step

    def token_spec(self, reverse: bool) -> pl.BlockSpec:
        """Of [B,T,H*D]."""
        return pl.BlockSpec((1, self.tokens, self.lanes), lambda b, n, t: (b, self.time(t, reverse), n))

    def state_spec(self) -> pl.BlockSpec:
        """Of [B,H,D,D]."""
        return pl.BlockSpec((1, self.heads_per_block, self.size, self.size), lambda b, n, t: (b, n, 0, 0))

    def segment_specs(self, reverse: bool) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Of the two arrays of `segment_arrays`."""
        return (
            pl.BlockSpec((1, 1, self.tokens), lambda b, n, t: (b, 0, self.time(t, reverse))),
            pl.BlockSpec(
                (1, 1, 3 * self.chunks),
                lambda b, n, t: (b * self.time_blocks + self.time(t, reverse), 0, 0),
                memory_space=pltpu.SMEM,
            ),
        )

    def scratch(self) -> list:
        """State, within, into, onto (see `Weights`)."""
        rows = pltpu.VMEM((self.tiles, CHUNK, self.tile), jnp.float32)
        return [
            pltpu.VMEM((self.tiles, self.tile, self.tile), jnp.float32),
            pltpu.VMEM((self.heads_per_block, CHUNK, CHUNK), jnp.float32),
            rows,
            rows,
        ]

    def flat(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.batch, self.length, self.heads * self.size)

    def per_head(self, log_decay: jax.Array) -> jax.Array:
        """log_decay [H] padded to whole blocks."""
        return jnp.pad(log_decay, (0, self.lane_blocks * self.heads_per_block - self.heads))

    def struct(self, like: jax.Array) -> jax.ShapeDtypeStruct:
        """[B,T,H*D], of the type of `like`."""
        shape = (self.batch, self.length, self.heads * self.size)
        return jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=jax.typeof(like).manual_axis_type)

    def state_struct(self, like: jax.Array) -> jax.ShapeDtypeStruct:
        """[B,H,D,D] float32, varying over the mesh as `like` does."""
        shape = (self.batch, self.heads, self.size, self.size)
        return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=jax.typeof(like).manual_axis_type)


def segment_arrays(blocks: Blocks, segment_ids: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """What a scan needs to know of the segments, from [B,T] ids that do not go down.

    Returns the ids, as [B,1,T'] with T' = T rounded up to whole blocks by padding, and bounds
    [B*time blocks, 1, 3*chunks] int32, three for each chunk, in tokens from its start:
      count: real tokens;
      reach: where the segment ends that comes in from the left (tokens before it see its state);
      tail: where the segment starts that goes out to the right (reverse: CHUNK if none crosses the right edge).
    The state passes through the whole chunk if reach >= count (reverse: and tail <= 0).
    """
    rows = blocks.time_blocks * blocks.tokens
    ids = jnp.pad(segment_ids, ((0, 0), (0, rows - blocks.length)), constant_values=PADDING)
    chunks = ids.reshape(blocks.batch, -1, CHUNK)
    real = is_real(chunks)
    count = real.sum(2, dtype=jnp.int32)
    first = chunks[:, :, 0]
    last = jnp.where(real, chunks, jnp.iinfo(jnp.int32).min).max(2)
    # The initial state is of token 0's segment, the gradient of the final state of the last real token's.
    before = jnp.concatenate([first[:, :1], last[:, :-1]], axis=1)
    after = jnp.concatenate([first[:, 1:], jnp.full_like(first[:, :1], PADDING)], axis=1)
    reach = (real & (chunks == before[..., None])).sum(2, dtype=jnp.int32)
    tail = count - (real & (chunks == last[..., None])).sum(2, dtype=jnp.int32)
    if reverse:
        tail = jnp.where((after == last) | (after == PADDING), tail, CHUNK)
    bounds = jnp.stack([count, reach, tail], axis=2).reshape(blocks.batch * blocks.time_blocks, 1, -1)
    return ids.reshape(blocks.batch, 1, rows), bounds


class Weights:
    """The powers of lam that a chunk needs, kept in VMEM for the heads of a block:

    within [heads,C,C]: lam^(i-j) for i >= j, else 0 (i runs along rows, or along lanes in a reverse scan);
    into [tiles,C,W]: lam^(i+1), from the state before the chunk to token i;
    onto [tiles,C,W]: lam^(C-1-j), from token j to the state after the chunk.

    Every power is the exponential of a number <= 0: as lam^i lam^-j they would overflow once slope * C exceeds 88.
    """

    def __init__(self, blocks: Blocks, log_decay, within, into, onto, ids, bounds):
        self.blocks, self.log_decay = blocks, log_decay
        self.within_ref, self.into_ref, self.onto_ref = within, into, onto
        self.ids, self.bounds = ids, bounds

    def head(self, tile: int, index: int):
        return self.log_decay[
            pl.program_id(1) * self.blocks.heads_per_block + tile * self.blocks.heads_per_tile + index
        ]

    def lane_decay(self, tile: int):
        """log decay [1,W] of each lane's head."""
        values = [jnp.full((1, self.blocks.tile), self.head(tile, i)) for i in range(self.blocks.heads_per_tile)]
        if len(values) == 1:
            return values[0]
        return jnp.where(lax.broadcasted_iota(jnp.int32, values[0].shape, 1) < self.blocks.size, *values)

    def fill(self, reverse: bool):
        square = (CHUNK, CHUNK)
        distance = lax.broadcasted_iota(jnp.int32, square, 0) - lax.broadcasted_iota(jnp.int32, square, 1)
        distance = -distance if reverse else distance
        position = lax.broadcasted_iota(jnp.int32, (CHUNK, self.blocks.tile), 0)
        for tile in range(self.blocks.tiles):
            for i in range(self.blocks.heads_per_tile):
                power = jnp.exp(self.head(tile, i) * jnp.maximum(distance, 0).astype(jnp.float32))
                self.within_ref[tile * self.blocks.heads_per_tile + i] = jnp.where(distance >= 0, power, 0.0)
            decay = self.lane_decay(tile)
            self.into_ref[tile] = jnp.exp(decay * (position + 1).astype(jnp.float32))
            self.onto_ref[tile] = jnp.exp(decay * (CHUNK - 1 - position).astype(jnp.float32))

    def chunk(self, index: int, step):
        """(count, reach, tail) of a chunk of time block `step`, as in `segment_arrays`; None if surely whole."""
        if self.bounds is not None:
            return tuple(self.bounds[0, 0, 3 * index + i] for i in range(3))
        if self.blocks.length % self.blocks.tokens == 0:
            return None
        count = jnp.clip(self.blocks.length - step * self.blocks.tokens - index * CHUNK, 0, CHUNK)
        return count, count, 0

    def into(self, tile: int, bounds):
        if bounds is None or self.bounds is None:
            return self.into_ref[tile]
        _, reach, _ = bounds
        position = lax.broadcasted_iota(jnp.int32, (CHUNK, self.blocks.tile), 0)
        return jnp.where(position < reach, self.into_ref[tile], 0.0)

    def onto(self, tile: int, bounds):
        if bounds is None:
            return self.onto_ref[tile]
        count, _, tail = bounds
        position = lax.broadcasted_iota(jnp.int32, (CHUNK, self.blocks.tile), 0)
        distance = jnp.maximum(count - 1 - position, 0).astype(jnp.float32)
        power = jnp.exp(self.lane_decay(tile) * distance)
        return jnp.where((position >= tail) & (position < count), power, 0.0)

    def keep(self, tile: int, bounds, reverse: bool):
        """[1,W], what the state is multiplied by from one side of the chunk to the other."""
        if bounds is None:
            return jnp.exp(self.lane_decay(tile) * float(CHUNK))
        count, reach, tail = bounds
        power = jnp.exp(self.lane_decay(tile) * count.astype(jnp.float32))
        passes = reach >= count
        return jnp.where(passes & (tail <= 0) if reverse else passes, power, 0.0)

    def within(self, tile: int, index: int, visible):
        """[C,C] of a head."""
        power = self.within_ref[tile * self.blocks.heads_per_tile + index]
        return power if visible is None else jnp.where(visible, power, 0.0)

    def visible(self, index: int):
        """[C,C], which pairs of tokens are of one segment; None without segments."""
        if self.ids is None:
            return None
        ids = jnp.broadcast_to(self.ids[0, :, index * CHUNK : (index + 1) * CHUNK], (CHUNK, CHUNK))
        return ids == ids.T

    def real(self, x, bounds):
        """x [C,W] with zeros for padding."""
        if self.ids is None:
            return x
        return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < bounds[0], x, 0.0)


def load(blocks: Blocks, ref, index: int, tile: int, step):
    """Chunk `index`, tile `tile` [C,W] of a token block, zero beyond the array: what is read there may be anything."""
    x = ref[0, index * CHUNK : (index + 1) * CHUNK, tile * blocks.tile : (tile + 1) * blocks.tile]
    if not blocks.is_ragged:
        return x
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0) + (step * blocks.tokens + index * CHUNK)
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) + (pl.program_id(1) * blocks.lanes + tile * blocks.tile)
    inside = (row < blocks.length) & (lane < blocks.heads * blocks.size)
    return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)


def of_head(blocks: Blocks, x, index: int):
    """x [..., W] with the lanes of the tile's other head set to zero: a product over lanes then is over one head."""
    if blocks.heads_per_tile == 1:
        return x
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane < blocks.size) if index == 0 else (lane >= blocks.size)
    return jnp.where(mine, x.astype(jnp.float32), 0.0).astype(x.dtype)


def block_diagonal(blocks: Blocks, x):
    """x [W,W] without what mixes the two heads of a tile."""
    if blocks.heads_per_tile == 1:
        return x
    row, lane = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where((row < blocks.size) == (lane < blocks.size), x, 0.0)


def dot(a, b, contract=(1, 0)):
    """A product accumulated in float32, exact for float32 operands."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def scaled(x, weights):
    """x times float32 weights, rounded to x's type."""
    return (x.astype(jnp.float32) * weights).astype(x.dtype)


def rounded(blocks: Blocks, scores):
    """Float32 scores [C,C] as a sum of matrices of the inputs' type, to multiply values with.

    Rounding to bfloat16 costs 1.6e-3 on average. Of a lone token it may be 3.9e-3, with nothing to average it: in short
    sequences, where the time for one more product is no matter, the rest is added too.
    """
    parts = [scores.astype(blocks.dtype)]
    if blocks.length <= CHUNK and blocks.dtype != jnp.float32:
        parts.append((scores - parts[0].astype(jnp.float32)).astype(blocks.dtype))
    return parts


def scores(blocks: Blocks, weights: Weights, tile: int, left, right, visible):
    """left right^T * within, `rounded`, for each head of a tile."""
    for i in range(blocks.heads_per_tile):
        products = dot(of_head(blocks, left, i), right, (1, 1))
        yield rounded(blocks, products * weights.within(tile, i, visible))


def mix(blocks: Blocks, parts: list, values):
    """The sum over a tile's heads of `scores` times the head's lanes of values, as one product."""
    left = [part for of_one_head in parts for part in of_one_head]
    right = [of_head(blocks, values, i) for i, of_one_head in enumerate(parts) for _ in of_one_head]
    return dot(jnp.concatenate(left, axis=1), jnp.concatenate(right, axis=0))


def load_state(blocks: Blocks, state, initial):
    """The scratch [tiles,W,W] from a block [1,heads,D,D], or zeros if None."""
    if initial is None or blocks.heads_per_tile > 1:
        state[...] = jnp.zeros_like(state)
    if initial is None:
        return
    for tile in range(blocks.tiles):
        for i in range(blocks.heads_per_tile):
            head = tile * blocks.heads_per_tile + i
            exists = pl.program_id(1) * blocks.heads_per_block + head < blocks.heads
            lanes = slice(i * blocks.size, (i + 1) * blocks.size)
            state[tile, lanes, lanes] = jnp.where(exists, initial[0, head], 0.0)


def store_state(blocks: Blocks, state, final):
    """The block [1,heads,D,D] from the scratch."""
    for tile in range(blocks.tiles):
        for i in range(blocks.heads_per_tile):
            lanes = slice(i * blocks.size, (i + 1) * blocks.size)
            final[0, tile * blocks.heads_per_tile + i] = state[tile, lanes, lanes]


def compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
