"""Does CISPO reach DAPO's score in half the steps? See README.md beside this file.

python -m experiments.cispo_vs_rivals.run [--only TASK ...] [--arms ARM ...] [--minutes N] [--out FOLDER] [--smoke]
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from experiments.cispo_vs_rivals import many, policy, report, tasks
from experiments.cispo_vs_rivals.arms import NAMES
from experiments.cispo_vs_rivals.loop import Settings
from experiments.cispo_vs_rivals.policy import Params
from experiments.cispo_vs_rivals.results import Job, Record, Results, figures
from m1jax.disk import write_atomically
from m1jax.errors import UserError

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the whole experiment; the first values are those that README.md laid down."""

    batches: int = 60
    start_steps: int = policy.START_STEPS
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    seeds: int = 8
    primary_seeds: int = 16
    updates: tuple[int, ...] = (16, 4, 1)


SMOKE = Size(3, 3, (1e-3, 3e-3), (100,), 2, 2, (16, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[str, ...] = tasks.TASKS
    """tasks"""
    arms: tuple[str, ...] = NAMES
    minutes: float | None = None
    """no block of runs is begun after so many"""
    width: int = 128
    """runs of a block; on a CPU, where they come one after another, 4"""
    out: Path = HERE / "results"
    smoke: bool = False
    """a tiny size, to see that all of it works"""

    def __post_init__(self) -> None:
        for given, known in ((self.only, tasks.TASKS), (self.arms, NAMES)):
            for name in given:
                if name not in known:
                    raise UserError(f"no {name!r}; there are: {', '.join(known)}")


def main(config: Config) -> None:
    size = SMOKE if config.smoke else Size()
    out = config.out / "smoke" if config.smoke else config.out
    out.mkdir(parents=True, exist_ok=True)
    tuning, runs = Results(out, "tuning"), Results(out, "runs")
    cells = [(task, updates) for task in tasks.TASKS if task in config.only for updates in size.updates]
    begun = time.monotonic()

    def in_time() -> bool:
        return config.minutes is None or time.monotonic() - begun < 60 * config.minutes

    with policy.portable():
        seeds = (*range(size.primary_seeds), *size.tuning_seeds)
        starts = many.starts(seeds, size.start_steps, out / "starts.npz")
        worth = many.recheck_accuracy(many.stacked(list(starts.values())))
        told = f"right after a recheck: {jnp.min(worth):.2f} to {jnp.max(worth):.2f}"
        print(f"starts: {time.monotonic() - begun:.0f} s, {told}", flush=True)
        write_atomically(out / "starts.json", json.dumps(dict(zip(starts, worth.tolist()))) + "\n")
        # The primary comparison first: it is there if time runs out.
        for part in (cells[:1], cells[1:]):
            wanted = [job for cell in part for job in tuning_jobs(*cell, config.arms, size)]
            execute(wanted, tuning, starts, size, config, in_time)
            wanted = [job for cell in part for job in main_jobs(*cell, config.arms, size, tuning)]
            execute(wanted, runs, starts, size, config, in_time)
    text = report.table(runs, tuning, size.rates)
    (out / "table.md").write_text(text)
    report.picture(runs, out)
    print(text)


def arms_of(updates: int, arms: Sequence[str]) -> list[str]:
    """With one update per batch all objectives have one gradient: `cispo` stands for all that share its advantages."""
    return [arm for arm in arms if updates > 1 or arm in ("cispo", "scalerl")]


def tuning_jobs(task: str, updates: int, arms: Sequence[str], size: Size) -> Iterator[Job]:
    for arm, rate, seed in itertools.product(arms_of(updates, arms), size.rates, size.tuning_seeds):
        yield Job(task, arm, updates, rate, seed)


def main_jobs(task: str, updates: int, arms: Sequence[str], size: Size, tuning: Results) -> Iterator[Job]:
    for arm in arms_of(updates, arms):
        rate = tuning.chosen(task, arm, updates)
        primary = arm in ("dapo", "cispo") and updates == max(size.updates)
        for seed in range(size.primary_seeds if primary else size.seeds):
            if rate is not None:
                yield Job(task, arm, updates, rate, seed)


def execute(jobs: list[Job], results: Results, starts: dict[int, Params], size: Size, config: Config, in_time) -> None:
    """Runs what is not in the results yet, block by block."""
    on_cpu = jax.default_backend() == "cpu"
    width = min(config.width, 4) if on_cpu else config.width
    device = jax.devices()[0].device_kind
    missing = [job for job in jobs if job not in results.records]
    for first in range(0, len(missing), width):
        if not in_time():
            return
        block, begun = missing[first : first + width], time.monotonic()
        padded = block if on_cpu else [*block, *[block[-1]] * (width - len(block))]
        state = many.begin(many.stacked([starts[j.seed] for j in padded]), jnp.array([j.seed for j in padded]))
        _, history = jax.device_get(many.train(state, settings(padded), batches=size.batches))
        found: dict[Job, Record] = {job: figures(history, n, device) for n, job in enumerate(block)}
        if results.kind == "tuning":
            found = {job: {"area": record["area"], "device": device} for job, record in found.items()}
        results.add(found)
        done = f"{first + len(block)} of {len(missing)} {results.kind}"
        print(f"{block[0].task} {block[0].arm} ...: {done}, {time.monotonic() - begun:.1f} s", flush=True)


def settings(jobs: Sequence[Job]) -> Settings:
    return Settings(
        task=jnp.array([tasks.TASKS.index(j.task) for j in jobs]),
        arm=jnp.array([NAMES.index(j.arm) for j in jobs]),
        updates=jnp.array([j.updates for j in jobs]),
        learning_rate=jnp.array([j.learning_rate for j in jobs]),
        mismatch=jnp.zeros(len(jobs)),
        truncated=jnp.zeros(len(jobs), bool),
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
