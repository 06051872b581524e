"""Does the planner's memory agree with the compiler's?

    python -m experiments.plan_memory.compare                      # all, some twenty minutes of processor time
    python -m experiments.plan_memory.compare --only m1-decode

Compiles real steps for TPU slices that are not here and writes `result.json`, `table.md` and `memory.png`.
"""

import dataclasses
import json
import time
from pathlib import Path

import tyro

from m1jax.config import ModelConfig
from m1jax.plan import hardware
from m1jax.plan.compile import compile_step, required_bytes, tpu_mesh
from m1jax.plan.memory import memory
from m1jax.plan.picture import draw
from m1jax.plan.setup import Setup
from m1jax.sharding import parse_mesh

HERE = Path(__file__).parent
GB = 1e9
M1, SMALL = ModelConfig.preset("m1-456b"), ModelConfig.preset("m1-1b")
# The layers of M1 and of m1-1b at their full width, but fewer, alternating, so that they compile in a minute.
M1_4 = dataclasses.replace(M1, layer_types=("lightning", "softmax") * 2)
SMALL_8 = dataclasses.replace(SMALL, layer_types=("lightning", "softmax") * 4)

# name -> (chip, mesh, the rest of the set-up)
CASES: dict[str, tuple[str, str, dict]] = {
    "m1-full": ("v5p", "fsdp=16,expert=8,tensor=4", dict(model=M1, task="rl", context=32_768, rows=128)),
    "m1-rl": ("v5p", "fsdp=4,expert=4,tensor=4", dict(model=M1_4, task="rl", context=8192, rows=16)),
    "m1-expert": ("v5p", "fsdp=8,expert=8", dict(model=M1_4, task="rl", context=4096, rows=64)),
    "m1-sequence": ("v5p", "fsdp=4,sequence=4,tensor=4", dict(model=M1_4, task="rl", context=65_536, rows=4)),
    "small-sft": ("v5e", "fsdp=4,tensor=2", dict(model=SMALL_8, task="sft", context=8192, rows=4)),
    "small-no-remat": ("v5e", "fsdp=8", dict(model=SMALL_8, task="rl", context=2048, rows=8, remat="none")),
    "m1-decode": ("v6e", "expert=8,tensor=8", dict(model=M1_4, task="generate", context=131_072, rows=32)),
    "m1-prefill": ("v5p", "expert=8,tensor=8", dict(model=M1_4, task="generate", context=2**20, rows=8, piece=4096)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare the planner with the compiler for TPUs."""

    only: tuple[str, ...] = ()
    """names of cases to compile; the others' results are kept"""


def case(name: str) -> tuple[Setup, str]:
    """(the set-up, the slice as libtpu names it)"""
    chip, mesh, rest = CASES[name]
    setup = Setup(mesh=parse_mesh(mesh), **rest)
    return setup, f"{chip}:{hardware.CHIPS[chip].topologies[setup.devices]}"


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown, one line per case."""
    lines = ["| case | task | slice, mesh | rows x tokens | computed GB | compiler GB | difference | processor time |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, found in results.items():
        setup, topology = case(name)
        task = setup.task + ", no remat" * (setup.remat == "none") + f", piece {setup.piece}" * (setup.piece > 1)
        computed = sum(memory(setup, "tpu").values())
        lines.append(
            f"| {name} | {task} | {topology}, {CASES[name][1]} | {setup.rows} x {setup.context:,} | "
            f"{computed / GB:.2f} | {found['bytes'] / GB:.2f} | {computed / found['bytes'] - 1:+.1%} | "
            f"{found['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    """Compiles, then writes the three files."""
    file = HERE / "result.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in config.only or CASES:
        setup, topology = case(name)
        mesh = tpu_mesh(topology, CASES[name][1])
        began = time.process_time()  # not the clock's: the machine may have other work
        program = compile_step(setup, mesh)
        results[name] = {"bytes": required_bytes(program), "seconds": round(time.process_time() - began, 1)}
        file.write_text(json.dumps(results, indent=1) + "\n")
    results = {name: results[name] for name in CASES if name in results}
    print(table(results))
    (HERE / "table.md").write_text(table(results) + "\n")
    bars = {f"{name}, {case(name)[1]}": memory(case(name)[0], "tpu") for name in results}
    chips = [hardware.CHIPS[CASES[name][0]] for name in results]
    draw(
        bars,
        {label: chip.memory for label, chip in zip(bars, chips)},
        HERE / "memory.png",
        {label: found["bytes"] for label, found in zip(bars, results.values())},
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
