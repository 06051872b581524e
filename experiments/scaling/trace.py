"""What one update's trace says: how long each card computed, how long it communicated, and how much of that showed."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Spans = list[tuple[float, float]]
EXCHANGES = ("nccl", "RaggedAllToAll", "MultiGpuBarrier")
"""kernels of NCCL, and XLA's own"""


def read(directory: Path) -> tuple[dict[str, float], list[str]]:
    """(milliseconds, mean over the cards traced: "span" from the first kernel to the last, "kernels" in which any ran,
    "collectives" in which an exchange ran, "exposed" in which nothing else did; what ran, longest first)."""
    from jax.profiler import ProfileData

    (file,) = directory.rglob("*.xplane.pb")
    cards = [
        [event for line in plane.lines if line.name.startswith("Stream") for event in line.events]
        for plane in ProfileData.from_file(str(file)).planes
        if plane.name.startswith("/device:GPU")
    ]
    return summary(cards)


def summary(cards: list[list[Any]]) -> tuple[dict[str, float], list[str]]:
    """`read`, of each card's events."""
    cards = [events for events in cards if events]
    totals: dict[str, float] = collections.defaultdict(float)
    names: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    for events in cards:
        spans: dict[bool, Spans] = {True: [], False: []}
        for event in events:
            label, start, length = event.name, event.start_ns / 1e6, event.duration_ns / 1e6
            spans[any(name in label for name in EXCHANGES)].append((start, start + length))
            names[label] += length
            calls[label] += 1
        everything = spans[True] + spans[False]
        totals["span"] += max(end for _, end in everything) - min(start for start, _ in everything)
        totals["kernels"] += covered(everything)
        totals["collectives"] += covered(spans[True])
        totals["exposed"] += covered(everything) - covered(spans[False])
    count = max(1, len(cards))
    longest = sorted(names.items(), key=lambda found: -found[1])
    lines = [f"{ms / count:9.3f} ms {calls[label] // count:6d} x {label}" for label, ms in longest]
    return {name: total / count for name, total in totals.items()}, lines


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The time in which at least one of the spans runs."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
