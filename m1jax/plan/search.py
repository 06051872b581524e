"""Meshes: those that can shard a set-up, and the smallest that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from m1jax.plan.hardware import Chip
from m1jax.plan.memory import memory
from m1jax.plan.setup import Setup
from m1jax.plan.speed import speed
from m1jax.sharding import AXES, is_shardable


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """All ways to spread devices, a power of two, over fsdp, expert, tensor and sequence."""
    sizes = [2**i for i in range(devices.bit_length()) if 2**i <= devices]
    for tensor in sizes:
        for sequence in sizes:
            for expert in sizes:
                fsdp, rest = divmod(devices, tensor * sequence * expert)
                if fsdp and not rest:
                    yield dict(zip(AXES, (1, fsdp, expert, tensor, sequence)))


def variants(setup: Setup, devices: int) -> Iterator[Setup]:
    """The same on so many devices: every mesh that can shard it. The rows of training grow to the devices' number if
    there are fewer rows than devices to share them."""
    for mesh in meshes(devices):
        least = mesh["data"] * mesh["fsdp"] * mesh["expert"]
        rows = setup.rows if setup.task == "generate" else -(-setup.rows // least) * least
        batch, time = (None, None) if setup.task == "generate" else (rows, setup.context)
        if is_shardable(setup.model, mesh, batch=batch, time=time):
            yield dataclasses.replace(setup, mesh=mesh, rows=rows)


def best(setup: Setup, chip: Chip, devices: int) -> Setup | None:
    """The fastest mesh (by the bound) of so many devices that fits; None if none does."""
    fitting = [s for s in variants(setup, devices) if sum(memory(s, chip.platform).values()) <= chip.memory]
    return min(fitting, key=lambda s: speed(s, chip, 0).million_tokens_seconds, default=None)


def smallest(setup: Setup, chip: Chip, limit: int = 4096) -> Setup | None:
    """The fastest mesh of the fewest devices (powers of two up to `limit`) on which the set-up fits."""
    counts = sorted(chip.topologies) if chip.topologies else [2**i for i in range(limit.bit_length())]
    return next((found for n in counts if n <= limit and (found := best(setup, chip, n)) is not None), None)


def remedies(setup: Setup, chip: Chip) -> list[str]:
    """What would make a set-up fit, most harmless first; empty if nothing tried here does."""

    def fits(**changes: Any) -> bool:
        return sum(memory(dataclasses.replace(setup, **changes), chip.platform).values()) <= chip.memory

    found = []
    if setup.task != "generate" and setup.remat != "layers" and fits(remat="layers"):
        found.append("--remat layers: recompute layers for the backward pass")
    least = 1 if setup.task == "generate" else setup.mesh["data"] * setup.mesh["fsdp"] * setup.mesh["expert"]
    rows = next((n for i in range(1, 32) if (n := setup.rows // 2**i) and n % least == 0 and fits(rows=n)), None)
    if rows is not None:
        what = "sequences at once" if setup.task == "generate" else "rows of a micro-batch (and more micro-batches)"
        found.append(f"--rows {rows}: fewer {what}")
    other = best(setup, chip, setup.devices)
    if other is not None:
        more = "" if other.rows == setup.rows else f" --rows {other.rows}"
        found.append(f"--mesh {spell(other.mesh)}{more}: the same devices arranged differently")
    else:
        more_devices = smallest(setup, chip)
        if more_devices is not None:
            found.append(f"{more_devices.devices} devices with --mesh {spell(more_devices.mesh)}")
    return found


def spell(mesh: dict[str, int]) -> str:
    """A mesh as the command line takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"
