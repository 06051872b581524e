"""How fast a training is, what that is of the hardware's peak, what memory it takes; and a trace of some updates."""

import contextlib
import resource
import sys
import time
from pathlib import Path

import jax

from m1jax.flops import peak_flops


class Meter:
    """Time, tokens and operations since the last record.

    Args:
        seconds, tokens: of the run so far, over all its processes one after the other.
    """

    def __init__(self, seconds: float = 0.0, tokens: int = 0):
        self.seconds, self.tokens = seconds, tokens
        device = jax.devices()[0]
        peak = peak_flops(device.device_kind)
        self._peak = None if peak is None else peak * max(1, jax.sharding.get_mesh().size)
        self._clock = time.monotonic()
        self._since = (self.seconds, self.tokens)
        self._flops = 0.0

    def add(self, tokens: float, flops: float) -> None:
        """One update, or one batch of generated tokens."""
        self.tokens += round(tokens)
        self._flops += flops
        self.tick()

    def tick(self) -> None:
        """Brings `seconds` up to now."""
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def record(self) -> dict[str, float | None]:
        """seconds of the whole run; per second since the last record: tokens_per_second, flops_per_second, and mfu, the
        model's own operations over the peak of all devices (None where the peak is unknown, as on a CPU);
        memory_bytes, the greatest so far on one device (on a CPU: of this process)."""
        self.tick()
        passed = max(self.seconds - self._since[0], 1e-9)
        rate, tokens = self._flops / passed, (self.tokens - self._since[1]) / passed
        self._since, self._flops = (self.seconds, self.tokens), 0.0
        return {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens, 1),
            "flops_per_second": rate,
            "mfu": None if self._peak is None else rate / self._peak,
            "memory_bytes": _memory(),
        }


MEASURED = (
    *("seconds", "tokens_per_second", "flops_per_second", "mfu", "memory_bytes"),
    *("generation_seconds", "sync_seconds", "waiting_seconds"),  # of `m1jax.rl`
)
"""Names in a record that differ from run to run; everything else is the same to the bit."""


def _memory() -> int:
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(s is not None and "peak_bytes_in_use" in s for s in stats):
        return max(s["peak_bytes_in_use"] for s in stats if s is not None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


class Tracer:
    """Traces a few updates for xprof and TensorBoard's profiler, after those that compile. A context manager.

    Args:
        directory: where the trace goes (`plugins/profile/...`), or None for none.
    """

    FIRST, LAST = 3, 5  # updates of this process

    def __init__(self, directory: Path | None):
        self._directory, self._update = directory, 0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def next(self) -> None:
        """Call before every update."""
        self._update += 1
        if self._directory is not None and self._update == self.FIRST:
            self._open.enter_context(jax.profiler.trace(str(self._directory)))
        if self._update == self.LAST + 1:
            self._open.close()
