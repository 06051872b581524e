"""An engine that is watched: what its runner did, how long that took, and which programs were compiled meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from collections.abc import Sequence as Several

import jax
import numpy as np
from jaxtyping import UInt8

from m1jax.config import ModelConfig
from m1jax.flops import parameters_per_token
from m1jax.inference.device import Decoded
from m1jax.inference.runner import ModelRunner
from m1jax.inference.scheduler import Chunk, Copy
from m1jax.inference.sequence import Sequence
from m1jax.model.cache import key_value_bytes, state_bytes


@dataclasses.dataclass
class Record:
    """What a runner did since somebody began to look."""

    decode_s: float = 0.0
    """in `decode`, until its results are on the host"""
    prefill_s: float = 0.0
    """in `prefill`, until the device has done it"""
    copy_s: float = 0.0
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
    """Waits for the device after every call, unless told not to, so that each second has its place."""

    record = Record()
    waits = True

    def copy(self, copies: Several[Copy]) -> None:
        begin = time.perf_counter()
        super().copy(copies)
        if self.waits:
            jax.block_until_ready(self._cache)
        self.record.copy_s += time.perf_counter() - begin

    def prefill(self, shape: tuple[int, int], chunks: Several[Chunk]) -> list[UInt8[np.ndarray, "n layers k"]]:
        begin = time.perf_counter()
        routes = super().prefill(shape, chunks)
        if self.waits:
            jax.block_until_ready(self._cache)
        self.record.prefill_s += time.perf_counter() - begin
        return routes

    def decode(self, sequences: Several[Sequence], allowances: Several[int], patience: int) -> Decoded[np.ndarray]:
        lengths = np.array([sequence.computed for sequence in sequences])
        begin = time.perf_counter()
        out = super().decode(sequences, allowances, patience)
        seconds, size = time.perf_counter() - begin, self.program_rows(len(sequences))
        self.record.decode_s += seconds
        self.record.calls += 1
        steps, before = self.record.programs.get(size, (0, 0.0))
        self.record.programs[size] = steps + int(out.counts.max()), before + seconds
        for step in range(int(out.counts.max())):
            writing = out.counts > step
            self.record.alive.append((int(writing.sum()), float(lengths[writing].mean()) + step))
        return out

    def idle_decode_s(self) -> float:
        """Seconds of a decode call of all rows in which nobody has anything to write: what one costs besides steps."""
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            self.idle(self._decode_rows[-1])
            times.append(time.perf_counter() - begin)
        return float(np.median(times))


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
