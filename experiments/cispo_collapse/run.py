"""Does CISPO collapse? See README.md beside this file.

python -m experiments.cispo_collapse.run [--rates FOLDER] [--minutes N] [--out FOLDER] [--smoke]
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.cispo_collapse import report, stored, survival
from experiments.cispo_vs_rivals import many, policy, tasks
from experiments.cispo_vs_rivals.arms import NAMES
from experiments.cispo_vs_rivals.loop import History, Settings
from experiments.cispo_vs_rivals.results import Results
from m1jax.disk import write_atomically
from m1jax.errors import UserError

HERE = Path(__file__).parent
ARMS = ("cispo", "dapo", "dppo")
MISMATCHES = (0.0, 1.0, 10.0)
UPDATES = 16


class Cell(NamedTuple):
    """One run."""

    arm: str
    mismatch: float
    truncated: bool
    replay: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Size:
    pieces: int = 10
    """of `batches` each; what is done is written after every one"""
    batches: int = 60
    seeds: int = 16
    together: int = 8
    """seeds of a block; blocks come one after the other"""
    start_steps: int = policy.START_STEPS


SMOKE = Size(2, 10, 2, 1, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rates: Path = HERE.parent / "cispo_vs_rivals" / "results"
    """results of cispo_vs_rivals, for its learning rates"""
    minutes: float | None = None
    """no piece is begun after so many"""
    out: Path = HERE / "results"
    work: Path = HERE / "work"
    """where runs are, to go on from: 80 MB a block"""
    smoke: bool = False
    """a tiny size, to see that all of it works"""


def main(config: Config) -> None:
    size = SMOKE if config.smoke else Size()
    out = config.out / "smoke" if config.smoke else config.out
    for folder in (out, config.work):
        folder.mkdir(parents=True, exist_ok=True)
    rates = chosen(config)
    begun = time.monotonic()
    with policy.portable():
        starts = many.starts(range(size.seeds), size.start_steps, config.work / "starts.npz")
        print(f"starts: {time.monotonic() - begun:.0f} s", flush=True)
        for first, replay in itertools.product(range(0, size.seeds, size.together), (False, True)):
            seeds = range(first, first + size.together)
            cells = [Cell(*cell) for cell in itertools.product(ARMS, MISMATCHES, (False, True), [replay], seeds)]
            name = f"replay-{'on' if replay else 'off'}-{first}"
            begin = many.begin(many.stacked([starts[c.seed] for c in cells]), jnp.array([c.seed for c in cells]))
            state, history = stored.load(config.work / f"{name}.npz", begin)
            while history is None or history.accuracy.shape[1] < size.pieces * size.batches:
                if config.minutes is not None and time.monotonic() - begun > 60 * config.minutes:
                    break
                state, more = many.train(state, settings(cells, rates), batches=size.batches, replay=replay)
                more = jax.device_get(more)
                history = more if history is None else jax.tree.map(lambda *x: np.concatenate(x, axis=1), history, more)
                stored.save(config.work / f"{name}.npz", state, history)
                np.savez_compressed(out / f"{name}.npz", **history._asdict())
                write(out / f"{name}.json", cells, history, rates)
                gaps = [more.gap[[c.mismatch == m for c in cells]].mean() for m in MISMATCHES]
                print(
                    f"{name}: {history.accuracy.shape[1]} batches, {time.monotonic() - begun:.0f} s, mean gap "
                    + ", ".join(f"{gap:.1e} (x {m:g})" for m, gap in zip(MISMATCHES, gaps)),
                    flush=True,
                )
    records = [record for file in sorted(out.glob("replay-*.json")) for record in json.loads(file.read_text())]
    if not records:
        print("nothing has been run yet: give it more --minutes")
        return
    records = report.watched(records)
    text = report.table(records)
    (out / "table.md").write_text(text)
    report.picture(records, out / "survival.png")
    print(text)


def chosen(config: Config) -> dict[str, float]:
    """The learning rate of each arm."""
    tuning = Results(config.rates, "tuning")
    found = {arm: 1e-3 if config.smoke else tuning.chosen("recheck", arm, UPDATES) for arm in ARMS}
    rates = {arm: rate for arm, rate in found.items() if rate is not None}
    if len(rates) < len(ARMS):
        raise UserError(
            f"{config.rates} holds no learning rates of {', '.join(a for a in ARMS if a not in rates)} on 'recheck': "
            "run experiments.cispo_vs_rivals.run first, or name its results with --rates"
        )
    return rates


def settings(cells: list[Cell], rates: dict[str, float]) -> Settings:
    return Settings(
        task=jnp.full(len(cells), tasks.RECHECKS),
        arm=jnp.array([NAMES.index(c.arm) for c in cells]),
        updates=jnp.full(len(cells), UPDATES),
        learning_rate=jnp.array([rates[c.arm] for c in cells]),
        mismatch=jnp.array([c.mismatch for c in cells]),
        truncated=jnp.array([c.truncated for c in cells]),
    )


def write(file: Path, cells: list[Cell], history: History, rates: dict[str, float]) -> None:
    """What the README asks of every run so far."""
    records = []
    for n, cell in enumerate(cells):
        accuracy = history.accuracy[n]
        fallen = survival.collapse(accuracy)
        watched = len(accuracy) if fallen is None else fallen
        records.append(
            cell._asdict()
            | {
                "learning_rate": rates[cell.arm],
                "device": jax.devices()[0].device_kind,
                "batches": len(accuracy),
                "collapsed": fallen,
                "warned": {d: survival.warning(getattr(history, d)[n][:watched]) for d in survival.DIAGNOSTICS},
                "accuracy_by_ten": [round(float(x), 3) for x in accuracy.reshape(-1, 10).mean(axis=1)],
                "gap_by_ten": [float(f"{x:.3g}") for x in history.gap[n].reshape(-1, 10).mean(axis=1)],
            }
        )
    write_atomically(file, "[" + ",\n".join(json.dumps(r) for r in records) + "]\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
