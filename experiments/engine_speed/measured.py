"""An engine that is watched: what its runner did, how long that took, and which programs were compiled meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from m1jax.config import ModelConfig
from m1jax.flops import parameters_per_token
from m1jax.inference import programs
from m1jax.inference.device import Call, Decoded
from m1jax.inference.rows import Prompts, Rows
from m1jax.inference.runner import ModelRunner
from m1jax.inference.scheduler import Chunk, Copy
from m1jax.inference.sequence import Sequence
from m1jax.inference.stopping import NEVER
from m1jax.model.cache import key_value_bytes, state_bytes


class Prefill(NamedTuple):
    """What a prefill had to do."""

    shape: tuple[int, int]
    chunks: int
    tokens: int
    """of the longest of them"""


@dataclasses.dataclass
class Record:
    """What a runner did since somebody began to look."""

    decode_s: float = 0.0
    """that decode calls were the oldest on their way, until their results were on the host"""
    prefill_s: float = 0.0
    """in `prefill`, until the device has done it, or it is on its way"""
    copy_s: float = 0.0
    copies: int = 0
    """calls of `copy` that nobody waited for"""
    prefills: Counter[Prefill] = dataclasses.field(default_factory=Counter)
    """of `prefill`, likewise"""
    calls: int = 0
    """of `decode`"""
    alive: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """of each decode step: rows that wrote a token, and their mean length in tokens"""
    programs: dict[int, tuple[int, float]] = dataclasses.field(default_factory=dict)
    """of each decode program, by its rows: steps and seconds"""

    @property
    def device_s(self) -> float:
        return self.decode_s + self.prefill_s + self.copy_s


class MeasuredRunner(ModelRunner):
    """Waits for the device after every call where the engine would, so that each second has its place; what the engine
    starts and does not wait for is counted, and timed alone (`started_s`)."""

    record = Record()
    waits = True
    free = 0.0
    """when the result of the last decode call was there"""

    def copy(self, copies: Several[Copy]) -> None:
        begin = time.perf_counter()
        super().copy(copies)
        if self.capacity.ahead:
            self.record.copies += 1
        elif self.waits:
            jax.block_until_ready(self._cache)
        self.record.copy_s += time.perf_counter() - begin

    def prefill(self, shape: tuple[int, int], chunks: Several[Chunk]) -> list[UInt8[np.ndarray, "n layers k"]]:
        begin = time.perf_counter()
        routes = super().prefill(shape, chunks)
        if self.capacity.ahead:
            self.record.prefills[Prefill(shape, len(chunks), max((chunk.count for chunk in chunks), default=0))] += 1
        elif self.waits:
            jax.block_until_ready(self._cache)
        self.record.prefill_s += time.perf_counter() - begin
        return routes

    def started_s(self, record: Record) -> float:
        """Seconds of the device for what was started and not waited for: as many calls like it, one after the other."""

        def call(work: Callable[[], object]) -> float:
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                for _ in range(4):
                    work()
                self._wait()
                times.append((time.perf_counter() - begin) / 4)
            return min(times)

        copies = record.copies * call(lambda: super(MeasuredRunner, self).copy([Copy(-1, -1)]))
        prefills = {prefill: call(functools.partial(self._read, prefill)) for prefill in record.prefills}
        return copies + sum(count * prefills[prefill] for prefill, count in record.prefills.items())

    def _read(self, prefill: Prefill) -> None:
        """As many tokens as a prefill had, from where sequences begin."""
        (rows, time), capacity = prefill.shape, self.capacity
        packed = Prompts.packed((rows, time), [], [], capacity)
        view, pages, chunks = Prompts.of(packed, time), capacity.pages_for(prefill.tokens), np.arange(prefill.chunks)
        view.counts[chunks], view.slots[chunks] = prefill.tokens, chunks
        view.tokens[:] = np.random.default_rng(0).integers(0, self.vocab_size, (rows, time))
        view.pages[chunks, :pages] = (chunks[:, None] * pages + np.arange(pages)) % capacity.pages
        self._cache, _ = programs.prefill(self._weights, self._cache, packed, time, self.records_routes)

    def decode(
        self, sequences: Several[Sequence], allowances: Several[int], steps: int, patience: int, after: Call | None
    ) -> Call:
        begin = time.perf_counter()
        inner = after.call if isinstance(after, MeasuredCall) else after
        return MeasuredCall(self, super().decode(sequences, allowances, steps, patience, inner), sequences, begin)

    def step_s(self, rows: int, length: int = 256) -> float:
        """Seconds of a decode step of the program of so many rows, all of which write after so many tokens: the
        device's own time, from calls one behind the other."""
        capacity, rng = self.capacity, np.random.default_rng(0)
        packed = self._at_rest[rows].copy()
        view, pages = Rows.of(packed), capacity.pages_for(length + capacity.steps)
        view.tokens[:], view.lengths[:] = rng.integers(0, self.vocab_size, rows), length
        view.slots[:] = np.arange(rows)
        view.top_p[:], view.patience[:], view.allowances[:] = 0.95, NEVER, capacity.steps
        view.pages[:, :pages] = np.arange(rows * pages).reshape(rows, pages) % capacity.pages

        def seconds(calls: int) -> float:
            times = []
            for _ in range(6):
                begin = time.perf_counter()
                for _ in range(calls):
                    if capacity.ahead:
                        self._decode_on(packed, capacity.steps, True)
                    else:
                        self._decode(packed, capacity.steps, rows, False)
                self._wait()
                times.append(time.perf_counter() - begin)
            return min(times)

        return (seconds(5) - seconds(1)) / (4 * capacity.steps)

    def idle_decode_s(self) -> float:
        """Seconds of a decode call of all rows in which nobody has anything to write: what one costs besides steps."""
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            self.idle(self._decode_rows[-1])
            times.append(time.perf_counter() - begin)
        return float(np.median(times))


class MeasuredCall(NamedTuple):
    """A decode call, and when it was made."""

    runner: MeasuredRunner
    call: Call
    sequences: Several[Sequence]
    begin: float

    def result(self) -> Decoded[np.ndarray]:
        lengths = np.array([sequence.computed for sequence in self.sequences])
        out, runner = self.call.result(), self.runner
        now, record = time.perf_counter(), runner.record
        seconds, size = now - max(self.begin, runner.free), runner.program_rows(len(self.sequences))
        runner.free = now
        record.decode_s += seconds
        record.calls += 1
        steps, before = record.programs.get(size, (0, 0.0))
        record.programs[size] = steps + int(out.counts.max()), before + seconds
        for step in range(int(out.counts.max())):
            writing = out.counts > step
            record.alive.append((int(writing.sum()), float(lengths[writing].mean()) + step))
        return out


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled inside, by the names that JAX gives them."""
    found: list[str] = []
    watching = True

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if watching and event == "/jax/core/compile/backend_compile_duration":
            found.append(str(kwargs.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        watching = False


def step_bytes(config: ModelConfig, dtype: jax.typing.DTypeLike, rows: int, length: float) -> float:
    """What a decode step must move at least: weights (of experts those that random routes touch), states both ways,
    keys and values."""
    used = config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** rows)
    more = used - config.experts_per_token
    weights = (
        parameters_per_token(config) + config.num_layers * more * 3 * config.hidden_size * config.intermediate_size
    )
    size = jax.numpy.dtype(dtype).itemsize
    return size * weights + rows * (2 * state_bytes(config) + length * key_value_bytes(config, dtype))
