"""`m1jax plan`: does it fit, how fast can it be at best, what does it cost."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m1jax.collectives import collectives, totals
from m1jax.config import ModelConfig
from m1jax.errors import UserError, require_positive
from m1jax.plan import hardware, search
from m1jax.plan.expected import expected
from m1jax.plan.memory import memory
from m1jax.plan.setup import Remat, Setup, Task
from m1jax.plan.speed import exchanges, speed
from m1jax.sharding import AXES, ROWS, parse_mesh

GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Will a model fit on hardware you do not have, how fast could it be at best, and what would it cost?

    m1jax plan --hardware v5p-1024 --task rl --context 32k --mesh fsdp=16,expert=8,tensor=4 --rows 128
    m1jax plan --hardware h200 --task generate --context 1m --search

    Computed, not run: parameters, optimizer and caches are exact, the rest is what XLA keeps on TPUs (within 10 % of
    the compiler, see docs/planner.md), times are lower bounds at the hardware's peak. Exits with status 1 if it does
    not fit.
    """

    hardware: str
    """Chip and number: h200x64, v6e-256, v5p-1024 (the cloud counts cores: 512 chips); with --search the chip alone.
    Chips: v5e, v5p, v6e, h100, h800, h200, b200."""
    preset: str = "m1-456b"
    """The model."""
    task: Task = "generate"
    """sft, rl: one update (forward, backward, AdamW, float32 master weights); generate: one step of all sequences."""
    context: str = "32k"
    """Tokens of a row, or room for prompt and answer: 32768, 128k, 1m."""
    mesh: str = ""
    """How the devices share the work, as in fsdp=16,expert=8,tensor=4; without it, the fastest mesh that fits."""
    rows: int | None = None
    """Rows of a micro-batch, or sequences generated at once, over all devices; default: one for each device that has
    its own rows, 1 for generation."""
    micro_batches: int = 1
    """Micro-batches of an update, one after the other."""
    piece: int = 1
    """Generation: tokens of each sequence per step; 1 is decoding, 4096 a piece of a prompt."""
    remat: Remat = "layers"
    """Training: what the backward pass computes again: whole layers (least memory), what is cheap, or nothing."""
    sequences: int = 1
    """Training: equally long ones packed into a row."""
    price: float | None = None
    """Dollars per device and hour; default: the list price that the output names."""
    search: bool = False
    """Find the fewest devices on which it fits."""
    compile: bool = False
    """Also compile the real step with the compiler for TPUs (libtpu; no chip needed; minutes for the 456 B model)."""
    picture: Path | None = None
    """Write a picture of bytes per device to this PNG file."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(config: Config) -> None:
    """Prints the plan.

    Raises:
        SystemExit: it does not fit, with status 1.
        UserError: unknown hardware or preset, a mesh that is not for these devices or cannot shard the model, or
            --compile without libtpu or for a GPU.
    """
    if config.price is not None:
        require_positive(config, "price", zero=True)
    name = config.hardware
    kind, chip, devices = hardware.parse_hardware(f"{name}x1" if config.search and name in hardware.CHIPS else name)
    price = chip.price if config.price is None else config.price
    setup = _setup(config, chip, devices)
    bytes_by_kind = memory(setup, chip.platform)
    compiled = _compile(setup, kind, chip) if config.compile else None
    plan = _summary(config, setup, kind, chip, price, bytes_by_kind, compiled)
    if config.picture is not None:
        from m1jax.plan.picture import draw

        name = f"{config.preset} {setup.task}\n{kind} x {setup.devices}"
        seen = {} if compiled is None else {name: compiled["peak_bytes"]}
        try:
            draw({name: bytes_by_kind}, {name: chip.memory}, config.picture, seen)
        except (OSError, ValueError) as error:  # no such directory; an ending that names no kind of picture
            raise UserError(f"--picture {config.picture}: cannot be written ({error})") from error
    if config.json:
        print(json.dumps(plan, indent=1))
    else:
        _print(plan)
    if not plan["fits"]:
        sys.exit(1)


def _setup(config: Config, chip: hardware.Chip, devices: int) -> Setup:
    """What the options ask for; where they leave the mesh open, the best one found."""
    sizes = parse_mesh("") if config.search or not config.mesh else _mesh(config, devices)
    default_rows = 1 if config.task == "generate" else math.prod(sizes[axis] for axis in ROWS)
    start = Setup(
        model=ModelConfig.preset(config.preset),
        task=config.task,
        mesh=sizes,
        context=hardware.parse_tokens(config.context),
        rows=default_rows if config.rows is None else config.rows,
        micro_batches=config.micro_batches,
        piece=config.piece,
        remat=config.remat,
        sequences=config.sequences,
    )
    asked = f"{config.task} of {config.preset} at {start.context:,} tokens"
    if config.search:
        found = search.smallest(start, chip)
        if found is None:
            raise UserError(
                f"{asked} fits on no mesh of {config.hardware}: fewer --rows or --context, or a larger chip"
            )
        return found
    if config.mesh:
        return start
    found = search.best(start, chip, devices) or next(search.variants(start, devices), None)
    if found is None:
        raise UserError(
            f"{asked}: no mesh of {devices} devices can shard it; a number that is a power of two works best"
        )
    return found


def _mesh(config: Config, devices: int) -> dict[str, int]:
    sizes = parse_mesh(config.mesh)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values() and devices % fixed == 0:
        return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if fixed != devices or -1 in sizes.values():

        def distance(mesh: dict[str, int]) -> float:
            return sum(abs(math.log2(mesh[axis] / abs(sizes[axis]))) for axis in AXES)

        nearest = search.spell(min(search.meshes(devices), key=distance))
        raise UserError(
            f"mesh {config.mesh!r} is for {fixed} devices, {config.hardware} has {devices}; the nearest is {nearest}"
        )
    return sizes


def _compile(setup: Setup, kind: str, chip: hardware.Chip) -> dict[str, Any]:
    if setup.devices not in chip.topologies:
        known = ", ".join(f"{kind}x{n}" for n in chip.topologies) or "v5e, v5p, v6e"
        raise UserError(f"--compile knows no TPU slice {kind}x{setup.devices}; there are {known}")
    from m1jax.plan.compile import compile_step, required_bytes, tpu_mesh

    began = time.monotonic()
    program = compile_step(setup, tpu_mesh(f"{kind}:{chip.topologies[setup.devices]}", search.spell(setup.mesh)))
    return {
        "seconds": time.monotonic() - began,
        "peak_bytes": required_bytes(program),
        "collectives": {name: {"count": n, "bytes": size} for name, (n, size) in totals(collectives(program)).items()},
    }


def _summary(
    config: Config,
    setup: Setup,
    kind: str,
    chip: hardware.Chip,
    price: float,
    parts: dict[str, float],
    compiled: dict[str, Any] | None,
) -> dict[str, Any]:
    """All figures under names that are also those of --json; bytes, seconds and dollars."""
    bound = speed(setup, chip, price)
    parts_of_time = expected(setup, chip.rates) if chip.rates and setup.devices <= chip.host else None
    total = sum(parts.values())
    fits = total <= chip.memory
    return {
        "preset": config.preset,
        "task": setup.task,
        "context": setup.context,
        "rows": setup.rows,
        "micro_batches": setup.micro_batches,
        "piece": setup.piece,
        "remat": setup.remat,
        "hardware": kind,
        "devices": setup.devices,
        "mesh": search.spell(setup.mesh),
        "bytes_per_device": parts,
        "total_bytes": total,
        "memory_bytes": chip.memory,
        "fits": fits,
        "remedies": [] if fits else search.remedies(setup, chip),
        "exchanges": [dataclasses.asdict(e) for e in exchanges(setup, chip.platform)],
        "compiled": compiled,
        **dataclasses.asdict(bound),
        "bound_by": bound.bound_by,
        "step_seconds": bound.seconds,
        "expected_seconds": parts_of_time,
        "price_per_device_hour": price,
        "price_source": chip.price_source if config.price is None else "--price",
    }


def _print(plan: dict[str, Any]) -> None:
    console = Console(highlight=False)
    amount = f"{plan['rows']} x {plan['context']:,} tokens"
    if plan["task"] == "generate":
        amount = f"{plan['rows']} sequences of {plan['context']:,} tokens, {plan['piece']} a step"
    where = f"on {plan['devices']} {plan['hardware']}, mesh {plan['mesh']}"
    console.print(f"[bold]{plan['preset']}, {plan['task']}[/], {amount}, {where}")
    table = Table("bytes per device", "GB", box=None)
    table.columns[1].justify = "right"
    for kind, size in plan["bytes_per_device"].items():
        table.add_row(kind, f"{size / GB:.2f}")
    table.add_row("[bold]together[/]", f"[bold]{plan['total_bytes'] / GB:.2f}[/]")
    table.add_row("there are", f"{plan['memory_bytes'] / GB:.2f}")
    if plan["compiled"]:
        table.add_row("the compiler says", f"{plan['compiled']['peak_bytes'] / GB:.2f}")
    console.print(table)
    if not plan["fits"]:
        console.print("[red]It does not fit.[/] What would:")
    elif plan["total_bytes"] > 0.9 * plan["memory_bytes"]:
        console.print("[yellow]It fits, but barely[/]: less than 10 % to spare, by which this computation may be off.")
    else:
        console.print("[green]It fits.[/]")
    for remedy in plan["remedies"]:
        console.print(f"  {remedy}")
    if not plan["fits"] and not plan["remedies"]:
        console.print("  nothing tried here: a larger chip, or a shorter --context")
    table = Table("exchanged per step and device", "over", "GB", box=None)
    table.columns[2].justify = "right"
    for exchange in plan["exchanges"]:
        table.add_row(exchange["purpose"], " x ".join(exchange["axes"]), f"{exchange['bytes'] / GB:.2f}")
    for name, found in (plan["compiled"] or {}).get("collectives", {}).items():
        table.add_row(f"compiled: {name}", f"{found['count']:,} times", f"{found['bytes'] / GB:.2f}")
    if table.rows:
        console.print(table)
    table = Table("at best", "", box=None)
    table.add_row("operations per token", f"{plan['flops_per_token']:.3g} FLOPs")
    times = f"operations {plan['compute']:.3g} s, HBM {plan['hbm']:.3g} s, links {plan['links']:.3g} s"
    table.add_row("a step", f"{plan['step_seconds']:.3g} s, bound by {plan['bound_by']} ({times})")
    table.add_row("MFU", f"at most {plan['mfu']:.1%}")
    if plan["expected_seconds"]:
        seconds = sum(plan["expected_seconds"].values())
        table.add_row(
            "expected", f"{seconds:.3g} s, MFU {plan['mfu'] * plan['step_seconds'] / seconds:.1%}: {_longest(plan)}"
        )
    price = f"at ${plan['price_per_device_hour']:.2f} an hour ({plan['price_source']})"
    cost = f"{plan['million_tokens_seconds']:.3g} s, ${plan['million_tokens_dollars']:.3g} {price}"
    table.add_row("a million tokens", cost)
    console.print(table)


def _longest(plan: dict[str, Any]) -> str:
    """What the expected time goes to, longest first."""
    parts = sorted(plan["expected_seconds"].items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts)
