"""The model on its device: a handful of programs, all compiled before the first request.

The states of a part's rows come first in its part of the pool, behind them lie those of kept prefixes. Rows of a decode
program are whoever decodes, so that the smallest program that has room for them serves; on a mesh they are the rows of
the scheduler. The pool is donated to every program and comes back renewed.

On a mesh, rows are spread over the devices that training cuts weights over by fsdp: each has weights whole (experts but
for expert and tensor, all others but for tensor), gathered once when they are loaded and not again for every token.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from collections.abc import Sequence as Several
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32, UInt8

from m1jax import parameters
from m1jax.inference import programs
from m1jax.inference.capacity import Capacity
from m1jax.inference.device import Call, Decoded
from m1jax.inference.guides import Guides
from m1jax.inference.mail import Mailbox
from m1jax.inference.programs import Out, Weights, Work, Written
from m1jax.inference.rows import Last, Prompts, Rows, advance, settle, unpack_decoded
from m1jax.inference.scheduler import Chunk, Copy
from m1jax.inference.sequence import Sequence
from m1jax.model import Cache, MiniMaxM1
from m1jax.sharding import ROWS, ambient_mesh, parameter_shardings
from pallas_kernels import target_platform

T = TypeVar("T")

COPIES = (1, 4, 16)
"""Copies that one call carries out, as many as there are or the next number of these; nobody waits for a loop that is
counted beforehand."""


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
        self._config = nnx.merge(graph, params).config
        self.vocab_size = self._config.vocab_size
        self.top = min(top, self.vocab_size)
        self._weights: Weights | None = None
        self._cache: Cache | None = None
        self._packed = Rows.at_rest(capacity.parts * capacity.rows, capacity)
        self._rows = Rows.of(self._packed)
        self._settled: list[tuple[list[int], int] | None] = [None] * len(self._packed)
        self._decode_rows = capacity.decode if capacity.parts == 1 else (len(self._packed),)
        self._at_rest = {rows: Rows.at_rest(rows, capacity) for rows in self._decode_rows}
        self._last = self._everywhere(Last.nothing(len(self._packed))) if capacity.ahead else None
        self._guide = ThreadPoolExecutor(1, thread_name_prefix="guide")
        self.load(params)
        self._mail: dict[int, Mailbox] = {}
        if constrains and capacity.ahead and self._mesh is None:
            assert self._weights is not None
            beside, words = self._weights.leaves[0], -(-self.vocab_size // 32)
            self._mail = {rows: Mailbox(rows, words, beside) for rows in self._decode_rows}
        self._compile()

    @property
    def guides_ahead(self) -> bool:
        return bool(self._mail)

    def load(self, params: nnx.State) -> int:
        self._wait()
        received = 0
        with self._on_mesh():
            model = prepared(nnx.merge(self._graph, params))
            if self._mesh is not None:
                placed = laid_out(model, parameter_shardings(model, self._mesh, whole=True))
                received, model = received_bytes(model, placed), placed
            self._weights = Weights.of(model)
            if self._cache is None:
                with self._beside(model):
                    self._cache = programs.empty(model.config, self.capacity, model.dtype)
        jax.block_until_ready(self._weights)
        return received

    def rest(self) -> None:
        self._wait()
        self._weights = self._cache = None

    def _wait(self) -> None:
        """Until the device has done what was started."""
        jax.block_until_ready(self._cache)

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _everywhere(self, x: T) -> T:
        """Whole on every device of the mesh."""
        return x if self._mesh is None else jax.device_put(x, NamedSharding(self._mesh, PartitionSpec()))

    def _beside(self, model: MiniMaxM1) -> contextlib.AbstractContextManager[object]:
        """Where arrays are made on the device that a model lies on."""
        if self._mesh is not None:
            return contextlib.nullcontext()
        return jax.default_device(next(iter(model.lm_head[...].devices())))

    def copy(self, copies: Several[Copy]) -> None:
        for start in range(0, len(copies), COPIES[-1]):
            some = copies[start : start + COPIES[-1]]
            numbers = np.full((next(n for n in COPIES if n >= len(some)), 4), -1, np.int32)
            numbers[: len(some)] = [(c.slot_from, c.slot_to, c.page_from, c.page_to) for c in some]
            with self._on_mesh():
                self._cache = programs.copy(self._cache, numbers)

    def prefill(self, shape: tuple[int, int], chunks: Several[Chunk]) -> list[UInt8[np.ndarray, "n layers k"]]:
        each, time = shape
        places: list[int] = []
        for chunk in chunks:
            part = chunk.sequence.row // self.capacity.rows
            places.append(part * each + sum(place // each == part for place in places))
        work = Prompts.packed((each * self.capacity.parts, time), chunks, places, self.capacity)
        with self._on_mesh():
            self._cache, out = programs.prefill(self._weights, self._cache, work, time, self.records_routes)
        if not self.records_routes:
            return []
        routes = jax.device_get(out)
        return [routes[i, : chunk.count] for i, chunk in zip(places, chunks)]

    def decode(
        self, sequences: Several[Sequence], allowances: Several[int], steps: int, patience: int, after: Call | None
    ) -> Call:
        for sequence in sequences:
            row = sequence.row
            settled = self._settled[row]
            if settled is None or settled[0] is not sequence.pages or settled[1] != len(sequence.pages):
                settle(self._rows, sequence)
                self._settled[row] = (sequence.pages, len(sequence.pages))
        advance(self._rows, sequences, allowances)
        rows = np.array([sequence.row for sequence in sequences])
        # The rows of a part lie in a part of the program; without parts, anywhere.
        places = rows if self.capacity.parts > 1 else np.arange(len(rows))
        size = self.program_rows(len(rows))
        packed = self._at_rest[size].copy()
        packed[places] = self._packed[rows]
        if isinstance(after, _Started):
            Rows.of(packed).follows[places] = [after.places.get(sequence, -1) for sequence in sequences]
        wants_top = any(sequence.request.top for sequence in sequences)
        cuts = steps == 1 or any(sequence.request.sampling.top_p < 1 for sequence in sequences)
        guides = asking = None
        if any(sequence.matcher is not None for sequence in sequences):
            before = after.guides if isinstance(after, _Started) else None
            guides = Guides(sequences, allowances, places, size, self.vocab_size, before)
            if self._mail and steps > 1 and not wants_top:
                out, asking = self._decode_by_mail(packed, cuts, guides)
            else:
                assert after is None
                out = self._decode_guided(packed, max(allowances), patience, wants_top, guides)
        elif self.capacity.ahead and not wants_top:
            out = self._decode_on(packed, steps, cuts)
        else:
            out = self._decode(packed, steps, patience, wants_top)
        return _Started(dict(zip(sequences, places.tolist())), out, wants_top, guides, asking)

    def _decode(self, packed: Int32[np.ndarray, "rows width"], steps: int, patience: int, wants_top: bool) -> Out:
        """XLA on a GPU holds the host up until this has ended: it looks whether there is another step."""
        with self._on_mesh():
            self._cache, self._last, out = programs.decode(*self._decode_work(packed, steps, patience, wants_top))
        return out

    def _decode_work(
        self, packed: Int32[np.ndarray, "rows width"], steps: int, patience: int, wants_top: bool
    ) -> tuple[Any, ...]:
        """Arguments of `programs.decode`."""
        numbers = np.int32(steps), np.int32(patience), np.bool_(wants_top)
        how = self.capacity, self.records_routes, self.top
        return self._weights, self._cache, packed, self._last, *numbers, *how

    def _decode_on(
        self, packed: Int32[np.ndarray, "rows width"], steps: int, cuts: bool, mail: jax.Array | None = None
    ) -> Out:
        with self._on_mesh():
            self._cache, self._last, out = programs.decode_on(*self._decode_on_work(packed, steps, cuts, mail))
        for x in jax.tree.leaves(out):
            x.copy_to_host_async()
        return out

    def _decode_on_work(
        self, packed: Int32[np.ndarray, "rows width"], steps: int, cuts: bool, mail: jax.Array | None
    ) -> tuple[Any, ...]:
        """Arguments of `programs.decode_on`."""
        return self._weights, self._cache, packed, self._last, mail, self.capacity, self.records_routes, steps, cuts

    def _decode_by_mail(
        self, packed: Int32[np.ndarray, "rows width"], cuts: bool, guides: Guides
    ) -> tuple[Out, _Asking]:
        """As `_decode_on`: another thread of the host answers what the program asks."""
        mailbox, steps, rows = self._mail[len(packed)], self.capacity.steps, Rows.of(packed)
        first = mailbox.numbers(steps)
        rows.asks[guides.rows], rows.message[:] = 1, first
        answered = self._guide.submit(guides.answer, mailbox, first, steps)
        with mailbox.closed_by_failure():
            return self._decode_on(packed, steps, cuts, mailbox.address), _Asking(mailbox, answered)

    def _decode_guided(
        self, packed: Int32[np.ndarray, "rows width"], steps: int, patience: int, wants_top: bool, guides: Guides
    ) -> Out:
        """As the decode program does, a step at a time: while the model's kernels are started and read a token, another
        thread of the host looks up what may follow it."""
        heard, top = None, self.top if wants_top else 0
        with self._on_mesh():
            work = Work(packed, np.int32(patience))
            most = self.capacity.steps
            work, written = programs.guided_begin(work, self._config, most, self.records_routes, top)
            for _ in range(steps):
                looking = self._guide.submit(guides.follow, heard)
                self._cache, seen = programs.guided_read(
                    self._weights, self._cache, work, written.next, self.records_routes
                )
                if (allowed := looking.result()) is None:
                    break
                written, heard = programs.guided_draw(work, written, seen, allowed, top)
                heard.copy_to_host_async()
            return programs.guided_end(written)

    def program_rows(self, decoding: int) -> int:
        """Rows of the program that serves so many."""
        return next(rows for rows in self._decode_rows if rows >= decoding)

    def idle(self, rows: int) -> None:
        """A call of one step of the decode program of so many rows, with nothing to write."""
        packed = self._at_rest[rows]
        out = self._decode_on(packed, 1, True) if self.capacity.ahead else self._decode(packed, 1, 1, False)
        programs.home(out, False)

    @property
    def _decodes(self) -> bool:
        """Whether `programs.decode` is used."""
        return not self.capacity.ahead or self.top > 0

    @property
    def _decodes_on(self) -> tuple[tuple[int, bool], ...]:
        """Steps and `cuts` of the programs that are made of `programs.decode_on`."""
        steps = self.capacity.steps
        return ((steps, False), (steps, True), (1, True)) if self.capacity.ahead else ()

    @property
    def _asks_by_mail(self) -> tuple[bool, ...]:
        """`cuts` of those of them that ask what may follow."""
        return (False, True) if self._mail else ()

    def _compile(self) -> None:
        """Run every program once, with no work to do, and what makes a request's key; the large ones are compiled side
        by side before."""
        jax.random.key_data(jax.random.key(0))
        with ThreadPoolExecutor(thread_name_prefix="compile") as pool, self._on_mesh():
            compiling = [pool.submit(lowered.compile) for lowered in self._lowered()]
        for compiled in compiling:
            compiled.result()
        for number in COPIES:
            self.copy([Copy(-1, -1)] * number)
        for shape in self.capacity.prefill:
            self.prefill(shape, [])
        for rows in self._decode_rows:
            if self._decodes:
                programs.home(self._decode(self._at_rest[rows], 1, 1, False), False)
            for steps, cuts in self._decodes_on:
                self._decode_on(self._at_rest[rows], steps, cuts)
            if self.constrains:
                nobody = Guides([], [], np.arange(0), rows, self.vocab_size)
                for cuts in self._asks_by_mail:
                    self._decode_by_mail(self._at_rest[rows].copy(), cuts, nobody)
                for wants_top in {False, self.top > 0}:
                    self._decode_guided(self._at_rest[rows], 2, 1, wants_top, nobody)

    def _lowered(self) -> Iterator[Any]:
        """The programs that read prompts and decode, ready to be compiled: the largest first."""
        for rows in reversed(self._decode_rows):
            if self._decodes:
                yield programs.decode.lower(*self._decode_work(self._at_rest[rows], 1, 1, False))
            for steps, cuts in self._decodes_on:
                yield programs.decode_on.lower(*self._decode_on_work(self._at_rest[rows], steps, cuts, None))
            if self.constrains:
                yield from self._lowered_guided(rows)
        for rows, time in self.capacity.prefill:
            work = Prompts.packed((rows * self.capacity.parts, time), [], [], self.capacity)
            yield programs.prefill.lower(self._weights, self._cache, work, time, self.records_routes)

    def _lowered_guided(self, rows: int) -> Iterator[Any]:
        """Programs that ask for what may follow, and the halves of guided steps."""
        for cuts in self._asks_by_mail:
            work = self._decode_on_work(self._at_rest[rows], self.capacity.steps, cuts, self._mail[rows].address)
            yield programs.decode_on.lower(*work)
        packed, routes = Work(self._at_rest[rows], np.int32(1)), self.records_routes

        def begun(work: Work, top: int) -> tuple[Work, Written]:
            return programs.guided_begin(work, self._config, self.capacity.steps, routes, top)

        work, written = jax.eval_shape(functools.partial(begun, top=0), packed)
        read = self._weights, self._cache, work, written.next
        yield programs.guided_read.lower(*read, routes)
        _, seen = programs.guided_read.eval_shape(*read, routes)
        allowed = jax.ShapeDtypeStruct((rows, -(-self.vocab_size // 32)), np.uint32)
        for top in {0, self.top}:
            _, written = jax.eval_shape(functools.partial(begun, top=top), packed)
            yield programs.guided_draw.lower(work, written, seen, allowed, top)


class _Asking(NamedTuple):
    """By mail."""

    mailbox: Mailbox
    answered: Future[None]
    """when all its questions are"""


class _Started(NamedTuple):
    """A decode call of a `ModelRunner`."""

    places: dict[Sequence, int]
    """rows of its program"""
    out: Out
    wants_top: bool
    guides: Guides | None
    asks: _Asking | None

    def result(self) -> Decoded[np.ndarray]:
        places = list(self.places.values())
        with contextlib.nullcontext() if self.asks is None else self.asks.mailbox.closed_by_failure():
            out = jax.tree.map(lambda x: x[places], programs.home(self.out, self.wants_top))
        if self.asks is not None:
            self.asks.answered.result()
        return unpack_decoded(out.all)._replace(routes=out.routes, top_tokens=out.top_tokens, top_logp=out.top_logp)


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


def laid_out(model: MiniMaxM1, shardings: Any) -> MiniMaxM1:
    """A model with these shardings of one mesh.

    What lies in another way on its devices they lay out anew, in one program: `jax.device_put` takes an array of which
    no device has what another one needs to the host and back.
    """
    leaves, tree = jax.tree.flatten(model)
    wanted: list[NamedSharding] = jax.tree.leaves(shardings)
    anew = [i for i, (x, to) in enumerate(zip(leaves, wanted)) if _is_cut_anew(x, to)]
    moved = jax.jit(_same, out_shardings=[wanted[i] for i in anew])([leaves[i] for i in anew])
    for i, x in zip(anew, moved):
        leaves[i] = x
    return jax.device_put(tree.unflatten(leaves), shardings)


def _is_cut_anew(x: Any, to: NamedSharding) -> bool:
    """Whether an array lies on the devices of a sharding, in the same order, but in another way."""
    where = getattr(x, "sharding", None)
    if not isinstance(where, NamedSharding) or where.is_equivalent_to(to, x.ndim):
        return False
    here, there = where.mesh, to.mesh
    return isinstance(here, Mesh) and isinstance(there, Mesh) and [*here.devices.flat] == [*there.devices.flat]


def _same(arrays: list[jax.Array]) -> list[jax.Array]:
    return arrays


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
