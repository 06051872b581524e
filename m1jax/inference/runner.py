"""The model on its device: a handful of programs, all compiled before the first request.

Rows of the programs are rows of the scheduler. The states of a part's rows come first in its part of the pool, behind
them lie those of kept prefixes. The pool is donated to every program and comes back renewed.

On a mesh, rows are spread over the devices that training cuts weights over by fsdp: each has weights whole (experts but
for expert and tensor, all others but for tensor), gathered once when they are loaded and not again for every token.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence as Several
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, UInt8, UInt32

from m1jax import parameters
from m1jax.config import ModelConfig
from m1jax.inference.capacity import Capacity
from m1jax.inference.device import Decoded
from m1jax.inference.sampling import ALL, sample
from m1jax.inference.scheduler import Chunk, Copy
from m1jax.inference.sequence import Sequence
from m1jax.inference.stopping import END_IDS, NEVER, Stops, ended
from m1jax.model import Cache, MiniMaxM1, head
from m1jax.sharding import ROWS, ambient_mesh, parameter_shardings
from pallas_kernels import target_platform

COPIES = 16
"""Copies that one call carries out."""


A = TypeVar("A", np.ndarray, jax.Array)


class Rows(NamedTuple, Generic[A]):
    """What the decode program must know of each row: numpy's arrays are filled on the host, JAX's read on the device.

    Each is [rows] or [rows, ...], int32 where nothing else is said.
    """

    tokens: A
    lengths: A
    """tokens that states and keys have seen"""
    allowances: A
    """tokens to write at most; 0: the row is at rest"""
    numbers: A
    """of the next token in its completion"""
    samples: A
    keys: A
    """[rows, words] uint32"""
    temperature: A
    """float32"""
    top_p: A
    """float32"""
    end_ids: A
    """[rows, END_IDS]; this and the rest are those of `Stops`"""
    certain: A
    """float32"""
    patience: A
    run: A
    pages: A
    """[rows, pages]; -1: none"""

    @classmethod
    def at_rest(cls, capacity: Capacity, key_words: int) -> Rows[np.ndarray]:
        rows, pages = capacity.parts * capacity.rows, capacity.pages_for(capacity.max_length)
        tokens, lengths, allowances, numbers, samples, patience, run = np.zeros((7, rows), np.int32)
        temperature, top_p, certain = np.ones((3, rows), np.float32)
        keys = np.zeros((rows, key_words), np.uint32)
        end_ids, pages = np.full((rows, END_IDS), -1, np.int32), np.full((rows, pages), -1, np.int32)
        return Rows(
            tokens,
            lengths,
            allowances,
            numbers,
            samples,
            keys,
            temperature,
            top_p,
            end_ids,
            certain,
            patience,
            run,
            pages,
        )


class Prompts(NamedTuple, Generic[A]):
    """What the prefill program must know of each row, likewise."""

    tokens: A
    """[rows, time]"""
    counts: A
    """of the row's tokens that are real"""
    lengths: A
    slots: A
    pages: A


def settle(rows: Rows[np.ndarray], sequence: Sequence) -> None:
    """Write down what stays as it is while a sequence has its row and its pages."""
    row, sampling, stop = sequence.row, sequence.request.sampling, sequence.request.sampling.repetition_stop
    rows.keys[row], rows.samples[row] = sequence.key, sequence.sample
    rows.temperature[row], rows.top_p[row] = sampling.temperature, sampling.top_p
    rows.end_ids[row] = -1
    rows.end_ids[row, : len(sampling.end_ids)] = sampling.end_ids
    rows.certain[row] = 0.0 if stop is None else np.log(np.maximum(stop.probability, 1e-30))
    rows.patience[row] = NEVER if stop is None else stop.tokens
    rows.pages[row] = -1
    rows.pages[row, : len(sequence.pages)] = sequence.pages


def advance(rows: Rows[np.ndarray], sequence: Sequence, allowance: int) -> None:
    """Write down what every decode step changes."""
    row = sequence.row
    rows.tokens[row], rows.lengths[row] = sequence.tokens[-1], sequence.computed
    rows.allowances[row], rows.numbers[row], rows.run[row] = allowance, sequence.new, sequence.certain


class ModelRunner:
    """`device.Runner` of a MiniMax-M1.

    Args:
        graph, params: `nnx.split(model)`; the weights are prepared for decoding, which leaves the parameters alone.
        capacity: sizes of memory and programs; as many parts as the ambient mesh has (`parts`).
        record_routes: whether requests may ask for routes.
        top: how many of the likeliest tokens requests may ask for.
        constrains: whether requests may have constraints.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[MiniMaxM1],
        params: nnx.State,
        capacity: Capacity,
        *,
        record_routes: bool = False,
        top: int = 0,
        constrains: bool = False,
    ) -> None:
        assert capacity.parts == parts()
        self.capacity, self.records_routes, self.constrains = capacity, record_routes, constrains
        self._graph, self._mesh = graph, decoding_mesh()
        self.vocab_size = nnx.merge(graph, params).config.vocab_size
        self.top = min(top, self.vocab_size)
        self._model: MiniMaxM1 | None = None
        self._cache: Cache | None = None
        self._rows = Rows.at_rest(capacity, jax.random.key_data(jax.random.key(0)).shape[-1])
        self._settled: list[tuple[list[int], int] | None] = [None] * len(self._rows.tokens)
        self._decode_rows = capacity.decode if capacity.parts == 1 else (len(self._rows.tokens),)
        words = -(-self.vocab_size // 32)
        self._free = {rows: jnp.full((rows, words), ALL, jnp.uint32) for rows in self._decode_rows if constrains}
        self.load(params)
        self._compile()

    def load(self, params: nnx.State) -> int:
        received = 0
        with self._on_mesh():
            model = prepared(nnx.merge(self._graph, params))
            if self._mesh is not None:
                placed = jax.device_put(model, parameter_shardings(model, self._mesh, whole=True))
                received, model = received_bytes(model, placed), placed
            self._model = model
            if self._cache is None:
                self._cache = _empty(model.config, self.capacity, model.dtype)
        jax.block_until_ready(self._model)
        return received

    def rest(self) -> None:
        self._model = self._cache = None

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def copy(self, copies: Several[Copy]) -> None:
        for start in range(0, len(copies), COPIES):
            some = copies[start : start + COPIES]
            numbers = np.full((COPIES, 4), -1, np.int32)
            numbers[: len(some)] = [(c.slot_from, c.slot_to, c.page_from, c.page_to) for c in some]
            with self._on_mesh():
                self._cache = _copy(self._cache, numbers, np.int32(len(some)))

    def prefill(self, shape: tuple[int, int], chunks: Several[Chunk]) -> list[UInt8[np.ndarray, "n layers k"]]:
        each, time = shape
        rows = each * self.capacity.parts
        tokens, pages = np.zeros((rows, time), np.int32), np.full((rows, self._rows.pages.shape[1]), -1, np.int32)
        counts, lengths, slots = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
        places = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.computed
            part = sequence.row // self.capacity.rows
            i = part * each + sum(place // each == part for place in places)
            places.append(i)
            tokens[i, : chunk.count] = sequence.tokens[start : start + chunk.count]
            counts[i], lengths[i], slots[i] = chunk.count, start, sequence.slot
            pages[i, : len(sequence.pages)] = sequence.pages
        work = Prompts(tokens, counts, lengths, slots, pages)
        with self._on_mesh():
            self._cache, routes = _prefill(self._model, self._cache, work, self.records_routes)
        if routes is None:
            return []
        routes = jax.device_get(routes)
        return [routes[i, : chunk.count] for i, chunk in zip(places, chunks)]

    def decode(self, sequences: Several[Sequence], allowances: Several[int], patience: int) -> Decoded[np.ndarray]:
        self._rows.allowances[:] = 0
        for sequence, allowance in zip(sequences, allowances):
            row = sequence.row
            settled = self._settled[row]
            if settled is None or settled[0] is not sequence.pages or settled[1] != len(sequence.pages):
                settle(self._rows, sequence)
                self._settled[row] = (sequence.pages, len(sequence.pages))
            advance(self._rows, sequence, allowance)
        at = np.array([sequence.row for sequence in sequences])
        rows = next(rows for rows in self._decode_rows if rows > at.max())
        wants_top = any(sequence.request.top for sequence in sequences)
        out = self._decode(rows, patience, self._allowed(sequences, rows), wants_top)
        return jax.tree.map(lambda x: x[at], jax.device_get(out))

    def _allowed(self, sequences: Several[Sequence], rows: int) -> UInt32[np.ndarray | jax.Array, "rows words"] | None:
        """What each row may draw; None in an engine without constraints."""
        if not self.constrains:
            return None
        constrained = [(s, s.matcher) for s in sequences if s.matcher is not None]
        if not constrained:
            return self._free[rows]
        allowed = np.full(self._free[rows].shape, ALL, np.uint32)
        for sequence, matcher in constrained:
            allowed[sequence.row] = matcher.allowed(sequence.left)
        return allowed

    def _decode(
        self,
        rows: int,
        patience: int,
        allowed: UInt32[np.ndarray | jax.Array, "rows words"] | None,
        wants_top: bool,
    ) -> Decoded[jax.Array]:
        some = jax.tree.map(lambda x: x[:rows], self._rows)
        with self._on_mesh():
            self._cache, out = _decode(
                self._model,
                self._cache,
                some,
                allowed,
                np.int32(patience),
                np.bool_(wants_top),
                self.capacity,
                self.records_routes,
                self.top,
            )
        return out

    def _compile(self) -> None:
        """Run every program once, with no work to do."""
        self.copy([Copy(-1, -1)])
        for shape in self.capacity.prefill:
            self.prefill(shape, [])
        for rows in self._decode_rows:
            self._decode(rows, 1, self._allowed([], rows), False)


def parts() -> int:
    """How many parts an engine has on the ambient mesh: what rows are spread over."""
    mesh = ambient_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def decoding_mesh() -> Mesh | None:
    """The ambient mesh with its fsdp axis as more of data."""
    if ambient_mesh() is None:
        return None
    mesh = jax.sharding.get_mesh()
    data, fsdp, *others = mesh.devices.shape
    return Mesh(mesh.devices.reshape(data * fsdp, 1, *others), mesh.axis_names, axis_types=mesh.axis_types)


def received_bytes(before: MiniMaxM1, after: MiniMaxM1) -> int:
    """What all devices together took over from others when arrays were laid out anew."""
    total = 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        had = old.sharding.devices_indices_map(old.shape)
        for device, needs in new.sharding.devices_indices_map(new.shape).items():
            total += new.dtype.itemsize * (_elements(new.shape, needs) - _elements(new.shape, needs, had.get(device)))
    return total


def _elements(shape: tuple[int, ...], *parts: tuple[slice, ...] | None) -> int:
    """That all these parts of an array have in common; None has nothing."""
    if any(part is None for part in parts):
        return 0
    bounds = [[s.indices(n) for s, n in zip(part, shape)] for part in parts if part is not None]
    return math.prod(max(0, min(b[1] for b in of) - max(b[0] for b in of)) for of in zip(*bounds))


def prepared(model: MiniMaxM1) -> MiniMaxM1:
    """A model whose weights are as decoding reads them: in the compute dtype where the forward pass would cast them
    anyway, and on a CPU each layer's in arrays of their own."""
    if ambient_mesh() is not None:
        model = jax.tree.map(lambda x: x, model)
        model.whole = True
    apart = target_platform() == "cpu" and ambient_mesh() is None
    cast = any(leaf.dtype != model.dtype for path, leaf in jax.tree.leaves_with_path(model) if _is_cast(path))
    return _prepare(model, apart, cast) if apart or cast else model


@functools.partial(jax.jit, static_argnames=("apart", "cast"))
def _prepare(model: MiniMaxM1, apart: bool, cast: bool) -> MiniMaxM1:
    if cast:
        model = jax.tree.map_with_path(lambda path, x: x.astype(model.dtype) if _is_cast(path) else x, model)
    return model.unstacked() if apart else model


def _is_cast(path: tuple[object, ...]) -> bool:
    """Whether the forward pass casts a parameter to the compute dtype, rather than computing in float32."""
    parameter, _ = parameters.find(path)
    return not parameter.router and parameter.name not in ("lm_head", "coefficient")


def _pool(cache: Cache) -> Cache:
    """The memory without rows: the same tree, where it was, whatever it was used for."""
    cache = cache._replace(lengths=jnp.zeros(0, jnp.int32), slots=None, pages=None)
    if ambient_mesh() is None:
        return cache
    return cache._replace(runs=jax.lax.with_sharding_constraint(cache.runs, cache.specs().runs))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(config: ModelConfig, capacity: Capacity, dtype: jnp.dtype) -> Cache:
    slots, pages = capacity.parts * capacity.slots, capacity.parts * capacity.pages
    return _pool(Cache.pool(config, slots=slots, pages=pages, page_size=capacity.page_size, dtype=dtype))


T = TypeVar("T")


def _everywhere(out: T) -> T:
    """For every process to read."""
    return out if ambient_mesh() is None else jax.lax.with_sharding_constraint(out, P())


@functools.partial(jax.jit, donate_argnames="cache")
def _copy(cache: Cache, copies: Int[Array, "COPIES 4"], count: Int[Array, ""]) -> Cache:
    def one(i: jax.Array, cache: Cache) -> Cache:
        slot_from, slot_to, page_from, page_to = copies[i][:, None]
        cache = cache.copy_state(slot_from, jnp.where(slot_from < 0, -1, slot_to))
        cache = cache.clear_state(jnp.where(slot_from < 0, slot_to, -1))
        return _pool(cache.copy_pages(page_from, page_to))

    return jax.lax.fori_loop(0, count, one, cache)


@functools.partial(jax.jit, static_argnames="record_routes", donate_argnames="cache")
def _prefill(
    model: MiniMaxM1,
    cache: Cache,
    prompts: Prompts[jax.Array],
    record_routes: bool,
) -> tuple[Cache, UInt8[Array, "rows time layers k"] | None]:
    view = cache.with_rows(prompts.lengths, prompts.slots, prompts.pages)
    out = model.forward(prompts.tokens, view, lengths=prompts.counts, record_routes=record_routes)
    assert out.cache is not None
    return _pool(out.cache), _everywhere(out.routes)


@functools.partial(jax.jit, static_argnames=("capacity", "record_routes", "top"), donate_argnames="cache")
def _decode(
    model: MiniMaxM1,
    cache: Cache,
    rows: Rows[jax.Array],
    allowed: UInt32[Array, "rows words"] | None,
    patience: Int[Array, ""],
    wants_top: Bool[Array, ""],
    capacity: Capacity,
    record_routes: bool,
    top: int,
) -> tuple[Cache, Decoded[jax.Array]]:
    """Up to `steps` tokens for each row, until nobody may write any more, or `patience` rows may not."""
    fold_in = jax.vmap(jax.random.fold_in)
    keys = fold_in(jax.random.wrap_key_data(rows.keys), rows.samples)
    stops = Stops(rows.end_ids, rows.certain, rows.patience, rows.run)
    number, steps = jnp.arange(len(rows.tokens), dtype=jnp.int32), capacity.steps
    slots, shape = number + number // capacity.rows * capacity.snapshots, (len(number), steps)
    routes = (*shape, model.config.num_layers, model.config.experts_per_token)
    out = Decoded(
        counts=jnp.zeros_like(slots),
        tokens=jnp.zeros(shape, jnp.int32),
        logp=jnp.zeros(shape, jnp.float32),
        nucleus_logp=jnp.zeros(shape, jnp.float32),
        reasons=jnp.zeros_like(slots),
        certain=rows.run,
        routes=jnp.zeros(routes, jnp.uint8) if record_routes else None,
        top_tokens=jnp.zeros((*shape, top), jnp.int32) if top else None,
        top_logp=jnp.zeros((*shape, top), jnp.float32) if top else None,
    )

    def put(all: jax.Array | None, step: jax.Array, new: jax.Array | None) -> jax.Array | None:
        return None if all is None or new is None else all.at[:, step].set(new)

    def alive(out: Decoded[jax.Array]) -> Bool[Array, " rows"]:
        return (out.counts < rows.allowances) & (out.reasons == 0)

    def advance(
        carry: tuple[jax.Array, Cache, jax.Array, Decoded[jax.Array]],
    ) -> tuple[jax.Array, Cache, jax.Array, Decoded[jax.Array]]:
        step, cache, tokens, out = carry
        writing = alive(out)
        view = cache.with_rows(rows.lengths + out.counts, jnp.where(writing, slots, -1), rows.pages)
        seen = model.forward(tokens[:, None], view, record_routes=record_routes)
        assert seen.cache is not None
        drawn = sample(
            head.logits(seen.hidden[:, 0], model.lm_head[...]),
            fold_in(keys, rows.numbers + out.counts),
            temperature=rows.temperature,
            top_p=rows.top_p,
            allowed=allowed,
            top=top,
            wants_top=wants_top,
        )
        after, reasons = ended(stops._replace(run=out.certain), drawn.tokens, drawn.logp, writing)
        out = Decoded(
            counts=out.counts + writing,
            tokens=out.tokens.at[:, step].set(drawn.tokens),
            logp=out.logp.at[:, step].set(drawn.logp),
            nucleus_logp=out.nucleus_logp.at[:, step].set(drawn.nucleus_logp),
            reasons=jnp.where(writing, reasons, out.reasons),
            certain=after.run,
            routes=put(out.routes, step, None if seen.routes is None else seen.routes[:, 0]),
            top_tokens=put(out.top_tokens, step, drawn.top_tokens),
            top_logp=put(out.top_logp, step, drawn.top_logp),
        )
        return step + 1, _pool(seen.cache), drawn.tokens, out

    def unfinished(carry: tuple[jax.Array, Cache, jax.Array, Decoded[jax.Array]]) -> jax.Array:
        step, _, _, out = carry
        writing = alive(out)
        ended = jnp.sum(~writing & (rows.allowances > 0))
        return (step < steps) & jnp.any(writing) & (ended < patience)

    _, cache, _, out = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), cache, rows.tokens, out))
    return cache, _everywhere(out)
