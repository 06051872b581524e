"""Does the RL step of the 456 B model compile for a pod that is not here, and what would it take?

    python -m experiments.compile_456b.compile                      # M1 on 512 chips of a v5p pod slice
    python -m experiments.compile_456b.compile --topology v5p:2x2x1 --mesh fsdp=2,tensor=2 --preset m1-100m \\
        --rows 2 --time 2048

Compiles forward, backward and AdamW of one CISPO update with the compiler for TPUs (`libtpu`); nothing is allocated.
Writes the table of `README.md` beside this file to standard output.
"""

import dataclasses
import time
from typing import Any

import tyro

from m1jax.collectives import Collective, collectives, totals
from m1jax.config import ModelConfig
from m1jax.plan.compile import compile_step, required_bytes, tpu_mesh
from m1jax.plan.setup import Setup
from m1jax.sharding import parse_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compile one RL update for TPUs that are not here."""

    preset: str = "m1-456b"
    topology: str = "v5p:8x8x8"
    """chip and slice, as libtpu names them"""
    mesh: str = "fsdp=16,expert=8,tensor=4"
    rows: int = 128
    """rows of a micro-batch, over all devices"""
    time: int = 32_768
    """tokens per row"""


def report(listed: list[Collective], program: Any, seconds: float) -> str:
    """A Markdown table of bytes per device and of collectives per micro-batch."""
    gb = 1e9
    memory, needed = program.memory_analysis(), required_bytes(program)
    arguments, code = memory.argument_size_in_bytes, memory.generated_code_size_in_bytes
    lines = [
        f"compiled in {seconds:.0f} s",
        "",
        "| per device | GB |",
        "|---|---|",
        f"| parameters, optimizer, batch | {arguments / gb:.2f} |",
        f"| gradients, activations, gathered weights, at the peak | {(needed - arguments - code) / gb:.2f} |",
        f"| program | {code / gb:.2f} |",
        f"| together | {needed / gb:.2f} |",
        "",
        "| collective | runs | GB |",
        "|---|---|---|",
        *(f"| {kind} | {count} | {size / gb:.2f} |" for kind, (count, size) in totals(listed).items()),
        "",
        "| largest | array | devices | runs | GB |",
        "|---|---|---|---|---|",
        *(f"| {c.kind} | {c.shape} | {c.devices} | {c.count} | {c.bytes / gb:.2f} |" for c in listed[:16]),
    ]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Prints the report."""
    mesh = tpu_mesh(config.topology, config.mesh)
    setup = Setup(
        model=ModelConfig.preset(config.preset),
        task="rl",
        mesh=parse_mesh(config.mesh),
        context=config.time,
        rows=config.rows,
    )
    start = time.monotonic()
    program = compile_step(setup, mesh)
    seconds = time.monotonic() - start
    print(f"{config.preset}, {config.rows} rows of {config.time} tokens on {config.topology}, {config.mesh}:")
    print(report(collectives(program), program, seconds))


if __name__ == "__main__":
    main(tyro.cli(Config))
