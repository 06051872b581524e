"""What a model remembers between calls. Nobody else knows how it lies in memory.

The memory of all layers of a run lies in one pool: lightning layers keep one state per *slot*, softmax layers keep keys
and values in *pages* of equally many tokens. A row of a batch names its slot and its pages, so that many more sequences
can be remembered than are worked on, and several may share pages. Where nobody shares out slots and pages, row b has
slot b and one page of the whole length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from m1jax.config import LIGHTNING, ModelConfig
from m1jax.errors import UserError
from m1jax.model import parallel
from m1jax.sharding import ROWS
from pallas_kernels import PADDING, target_platform

GPU_PIECE = 64  # tokens of a page that a kernel takes at a time

Layer = int | Int[Array, ""]


class LightningCache(NamedTuple):
    """The states S of a run's layers, always float32."""

    state: Float[Array, "layers slots heads key value"]

    def attend(
        self,
        layer: Layer,
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time heads value"],
        log_decay: Float[Array, "*layers heads"],
        slots: Int[Array, " batch"] | None,
        segment_ids: Int[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time heads value"], LightningCache]:
        """Lightning attention that goes on from the rows' states; PADDING leaves a state as it is.

        One token a row advances the states in place; a row with a negative slot, or whose token is PADDING, is idle.
        """
        batch, time, _, _ = q.shape
        if time == 1:
            if segment_ids is not None:
                slots = jnp.where(segment_ids[:, 0] == PADDING, -1, jnp.arange(batch) if slots is None else slots)
            out, state = parallel.lightning_attention_decode(
                q[:, 0], k[:, 0], v[:, 0], log_decay, self.state, slots, layer
            )
            return out[:, None], LightningCache(state)
        # States in rows: the order in memory that the kernels would like does not reach the pool, which XLA would copy
        # into it, whole, and back.
        pool = self.state.reshape(*self.state.shape[:2], -1)
        before = pool[layer] if slots is None else pool.at[layer, slots].get(mode="fill", fill_value=0.0)
        before = before.reshape(-1, *self.state.shape[2:])
        out, after = parallel.lightning_attention(q, k, v, log_decay, initial_state=before, segment_ids=segment_ids)
        after = after.reshape(len(after), -1)
        if slots is None:
            pool = pool.at[layer].set(after)
        else:
            where = jnp.where(slots < 0, pool.shape[1], slots)  # past the end: dropped, where -1 would be the last
            pool = pool.at[layer, where].set(after, mode="drop")
        return out, LightningCache(pool.reshape(self.state.shape))


class SoftmaxCache(NamedTuple):
    """Rotated keys, and values, of a run's layers in the compute dtype."""

    keys: Float[Array, "layers pages page_size kv_heads channels"]
    values: Float[Array, "layers pages page_size kv_heads channels"]

    def append(
        self,
        layer: Layer,
        k: Float[Array, "batch time kv_heads channels"],
        v: Float[Array, "batch time kv_heads channels"],
        positions: Int[Array, "batch time"],
        pages: Int[Array, "batch pages_of_row"] | None,
        segment_ids: Int[Array, "batch time"] | None,
    ) -> SoftmaxCache:
        """Writes new keys and values at their positions; what has no page there is dropped.

        Without pages, PADDING writes behind its row's tokens, where no query looks until real tokens overwrite it.
        """
        pools, new = (self.keys, self.values), (k, v)
        if pages is None:
            return SoftmaxCache(*_written(pools, new, (layer, jnp.arange(len(k))[:, None], positions)))
        return SoftmaxCache(*parallel.append_to_pages(_appended, pools, pages, new, positions, segment_ids, layer))

    def attend(
        self,
        layer: Layer,
        q: Float[Array, "batch time heads channels"],
        positions: Int[Array, "batch time"],
        pages: Int[Array, "batch pages_of_row"] | None,
        segment_ids: Int[Array, "batch time"] | None,
    ) -> Float[Array, "batch time heads channels"]:
        """Softmax attention of each query to the keys of its row at and before its position."""
        if q.shape[1] == 1:
            idle = False if segment_ids is None else segment_ids[:, 0] == PADDING
            seen = jnp.where(idle, 0, positions[:, 0] + 1)
            return parallel.softmax_attention_decode(q[:, 0], self.keys, self.values, pages, seen, layer)[:, None]
        keys, values = self.keys[layer], self.values[layer]
        if pages is not None:
            row = jnp.maximum(pages, 0)
            keys, values = (x[row].reshape(len(pages), -1, *x.shape[2:]) for x in (keys, values))
        return parallel.softmax_attention(q, keys, values, q_start=positions[:, 0])


class Cache(NamedTuple):
    """The memory of a batch of sequences. A pytree: it goes into a call and a new one comes out.

    Attributes:
        lengths: tokens of each row seen so far.
        runs: the memory of each run of equal layers of a period, over all periods (``ModelConfig.runs``).
        slots: which state each row has, negative for none; None: row b has state b.
        pages: which pages each row has, in order, negative for none; None: row b has page b alone.
    """

    lengths: Int[Array, " batch"]
    runs: tuple[LightningCache | SoftmaxCache, ...]
    slots: Int[Array, " batch"] | None = None
    pages: Int[Array, "batch pages_of_row"] | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """Room for ``max_length`` tokens of ``batch`` sequences, none of them seen yet.

        On a GPU up to 63 more: its kernels read whole pieces of a page.

        Raises:
            UserError: ``max_length`` is more than the model's positions.
        """
        if not 0 < max_length <= config.max_position_embeddings:
            raise UserError(
                f"max_length = {max_length} must be between 1 and the model's "
                f"max_position_embeddings = {config.max_position_embeddings}"
            )
        room = -(-max_length // GPU_PIECE) * GPU_PIECE if target_platform() == "gpu" else max_length
        return cls(jnp.zeros(batch, jnp.int32), _pools(config, batch, batch, room, dtype))

    @classmethod
    def pool(cls, config: ModelConfig, *, slots: int, pages: int, page_size: int, dtype: jax.typing.DTypeLike) -> Cache:
        """Memory without rows, to be shared out with ``with_rows``: ``slots`` states per lightning layer and ``pages``
        of ``page_size`` tokens per softmax layer."""
        return cls(jnp.zeros(0, jnp.int32), _pools(config, slots, pages, page_size, dtype))

    def with_rows(
        self, lengths: Int[Array, " batch"], slots: Int[Array, " batch"], pages: Int[Array, "batch pages_of_row"]
    ) -> Cache:
        """The same memory, for other rows."""
        return self._replace(lengths=lengths, slots=slots, pages=pages)

    @property
    def max_length(self) -> int | None:
        """Tokens a row has room for, or None where no layer keeps any (a model of lightning layers only)."""
        pages = 1 if self.pages is None else self.pages.shape[1]
        return next((pages * run.keys.shape[2] for run in self.runs if isinstance(run, SoftmaxCache)), None)

    def repeat(self, times: int) -> Cache:
        """Each row ``times`` times, side by side, with memory of its own. For caches without slots and pages."""
        assert self.slots is None
        assert self.pages is None
        runs = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), self.runs)
        return Cache(jnp.repeat(self.lengths, times), runs)

    def copy_state(self, source: Int[Array, " n"], target: Int[Array, " n"]) -> Cache:
        """States of slots ``source`` written to slots ``target`` in every lightning layer; a negative target: none. On
        a mesh both lie in the same device's part of the pool, as pages in ``copy_pages``."""
        return self._with_states(_copied, source, target)

    def clear_state(self, slots: Int[Array, " n"]) -> Cache:
        """Zero states, of sequences that have seen nothing; negative slots are left out."""

        def cleared(state: jax.Array, slots: jax.Array) -> jax.Array:
            return state.at[:, jnp.where(slots < 0, state.shape[1], slots)].set(0.0, mode="drop")

        return self._with_states(cleared, slots)

    def copy_pages(self, source: Int[Array, " n"], target: Int[Array, " n"]) -> Cache:
        """Pages ``source`` written to pages ``target`` in every softmax layer; a negative target: none."""

        def copied(x: jax.Array) -> jax.Array:
            return parallel.in_parts(_copied, x, source, target, heads=3)

        runs = (SoftmaxCache(copied(r.keys), copied(r.values)) if isinstance(r, SoftmaxCache) else r for r in self.runs)
        return self._replace(runs=tuple(runs))

    def _with_states(self, function: Any, *slots: Int[Array, " n"]) -> Cache:
        """``function(states, *slots)`` in every lightning layer."""

        def states(run: LightningCache) -> LightningCache:
            return LightningCache(parallel.in_parts(function, run.state, *slots, heads=2))

        return self._replace(runs=tuple(states(r) if isinstance(r, LightningCache) else r for r in self.runs))

    def specs(self, rows: tuple[str, ...] | None = ROWS) -> Cache:
        """A PartitionSpec for every array: rows, slots and pages over the mesh axes ``rows``, heads over tensor."""
        row: Any = P(rows)  # specs stand where the arrays stand
        state: Any = P(None, rows, "tensor")
        kv: Any = P(None, rows, None, "tensor")
        runs = tuple(
            LightningCache(state) if isinstance(r, LightningCache) else SoftmaxCache(kv, kv) for r in self.runs
        )
        return Cache(row, runs, None if self.slots is None else row, None if self.pages is None else row)


def _appended(
    pools: tuple[jax.Array, ...],
    pages: Int[Array, "batch pages_of_row"],
    new: tuple[jax.Array, ...],
    positions: Int[Array, "batch time"],
    segment_ids: Int[Array, "batch time"] | None,
    layer: Layer,
) -> tuple[jax.Array, ...]:
    _, count, size, *_ = pools[0].shape
    page = jnp.take_along_axis(pages, positions // size, axis=1, mode="fill", fill_value=-1)
    there = page >= 0 if segment_ids is None else (page >= 0) & (segment_ids != PADDING)
    return _written(pools, new, (layer, jnp.where(there, page, count), positions % size))


def _written(pools: tuple[jax.Array, ...], new: tuple[jax.Array, ...], at: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """Pools with what is new in these places; what lies nowhere in them is dropped."""
    if new[0].shape[:2] == (1, 1) and target_platform() == "cpu":
        # XLA:CPU makes one token's place a slice, which it writes twice, for who reads the keys now and who does
        # later, into copies of all. Two places it leaves as they are: the second lies nowhere.
        layer, first, second = (jnp.broadcast_to(x, (1, 1)) for x in at)
        nowhere = jnp.full((1, 1), pools[0].shape[1])
        at = tuple(jnp.concatenate(x) for x in ((layer, layer), (first, nowhere), (second, second)))
        new = tuple(jnp.concatenate([x, x]) for x in new)
    return tuple(pool.at[at].set(x.astype(pool.dtype), mode="drop") for pool, x in zip(pools, new))


def _copied(
    pool: Float[Array, "layers places ..."], source: Int[Array, " n"], target: Int[Array, " n"]
) -> Float[Array, "layers places ..."]:
    where = jnp.where(target < 0, pool.shape[1], target)
    return pool.at[:, where].set(pool[:, jnp.maximum(source, 0)], mode="drop")


def _pools(
    config: ModelConfig, slots: int, pages: int, page_size: int, dtype: jax.typing.DTypeLike
) -> tuple[LightningCache | SoftmaxCache, ...]:
    def pool(kind: str, layers: int) -> LightningCache | SoftmaxCache:
        if kind == LIGHTNING:
            return LightningCache(
                jnp.zeros((layers, slots, config.num_heads, config.head_dim, config.head_dim), jnp.float32)
            )
        kv = (layers, pages, page_size, config.num_kv_heads, config.head_dim)
        return SoftmaxCache(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype))

    return tuple(pool(run.kind, config.num_periods * run.count) for run in config.runs)


def state_bytes(config: ModelConfig) -> int:
    """Of one sequence's lightning states, all layers."""
    return 4 * config.layer_types.count(LIGHTNING) * config.num_heads * config.head_dim**2


def key_value_bytes(config: ModelConfig, dtype: jax.typing.DTypeLike) -> int:
    """Of one token's keys and values, all softmax layers."""
    softmax = config.num_layers - config.layer_types.count(LIGHTNING)
    return 2 * softmax * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
