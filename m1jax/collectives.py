"""What a compiled program communicates: its collectives, how often each runs, and how many bytes it moves."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?(%[^},\s]+(?:, %[^},\s]+)*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_CONSTANT = re.compile(r"^s32\[\](?:\{.*?\})? constant\((\d+)\)")
_GROUPS_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUPS_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUPS_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange of one size."""

    kind: str
    shape: str
    """of the result on one device, for example "bf16[4096,6144]\""""
    devices: int
    """that take part in one exchange"""
    count: int
    """how often it runs in one call of the program; loops of unknown length count once"""
    bytes: int
    """of what is gathered, exchanged or reduced, on one device and over all runs: about what it sends and receives
    (twice that for an all-reduce)"""


def collectives(compiled: Any) -> list[Collective]:
    """All collectives among several devices in a program from ``jax.jit(f).lower(...).compile()``, largest first."""
    computations, entry = _parse(compiled.as_text())
    found: Counter[tuple[str, str, int]] = Counter()
    for (kind, shape, devices), times in _walk(computations, entry, 1):
        found[kind, shape, devices] += times
    listed = []
    for (kind, shape, devices), count in found.items():
        whole = _size(shape) * (devices if kind == "reduce-scatter" else 1)  # its result is only a part
        listed.append(Collective(kind, shape, devices, count, count * whole))
    return sorted(listed, key=lambda c: (-c.bytes, c.kind, c.shape))


def totals(listed: list[Collective]) -> dict[str, tuple[int, int]]:
    """Kind -> (how many run, bytes), over a list from ``collectives``."""
    return {
        kind: (sum(c.count for c in listed if c.kind == kind), sum(c.bytes for c in listed if c.kind == kind))
        for kind in KINDS
        if any(c.kind == kind for c in listed)
    }


def _parse(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (operation := _OPERATION.match(line)):
            current.append(operation[1])
    return computations, entry


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[tuple[str, str, int], int]]:
    for line in computations.get(name, []):
        result, _, rest = _split_result(line)
        operation = rest.partition("(")[0]
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            devices = _group_size(line)
            shapes = ["{}[{}]".format(*found) for found in _SHAPE.findall(result)]
            if operation != kind and kind != "all-reduce":  # an asynchronous start returns its operands before results
                shapes = [shape for shape in shapes if not shape.endswith("[]")]
                shapes = shapes[len(shapes) // 2 :]
            elif kind != "all-reduce":  # else several arrays may be reduced at once
                shapes = [max(shapes, key=_size, default="")]
            if devices > 1:
                yield from (((kind, shape, devices), times) for shape in shapes)
            continue
        trips = _trips(computations, line) if operation == "while" else 1
        for called in _CALLED.findall(line):
            for target in called.split(", "):
                yield from _walk(computations, target.lstrip("%"), times * trips)


def _trips(computations: dict[str, list[str]], loop: str) -> int:
    """How often a loop runs: as XLA found out (CPU, GPU), or from the only number its condition compares with (TPU)."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    condition = computations.get(_CONDITION.findall(loop)[0], [])
    numbers = [m[1] for line in condition if (m := _CONSTANT.match(line))]
    compared = condition and "compare(" in condition[-1] and "direction=LT" in condition[-1]
    return int(numbers[0]) if compared and len(numbers) == 1 else 1


def _split_result(line: str) -> tuple[str, str, str]:
    """The type and the operation of `type operation(...)`; a tuple's type holds spaces."""
    if not line.startswith("("):
        return line.partition(" ")
    depth = 0
    for i, character in enumerate(line):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return line[: i + 1], " ", line[i + 2 :]
    return line, "", ""


def _group_size(line: str) -> int:
    if "source_target_pairs" in line:
        return 2
    if iota := _GROUPS_IOTA.search(line):
        return int(iota[2])
    if mesh := _GROUPS_MESH.search(line):  # mesh['a'=2,'b'=4] {'a','b':(1)2}: axes, or parts of axes
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    listed = _GROUPS_LIST.search(line)
    return len(listed[1].split(",")) if listed else 2  # empty groups: all devices


def _size(shape: str) -> int:
    dtype, dims = _SHAPE.findall(shape)[0]
    return _BYTES.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
