"""What has been run, in a file per task that grows with every block of runs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m1jax.disk import write_atomically


class Job(NamedTuple):
    """One run, and the name it has in the results."""

    task: str
    arm: str
    updates: int
    learning_rate: float
    seed: int


Record = dict[str, Any]
KEPT = ("accuracy", "rechecked", "entropy", "clipped", "clipped_rare", "gap_max")
"""of the history, batch by batch"""


class Results:
    """Records of the runs of one kind ("tuning" or "runs") in a folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.records: dict[Job, Record] = {}
        for file in sorted(folder.glob(f"{kind}-*.json")):
            for record in json.loads(file.read_text()):
                self.records[Job(*(record[name] for name in Job._fields))] = record

    def add(self, found: dict[Job, Record]) -> None:
        self.records |= {job: job._asdict() | record for job, record in found.items()}
        for task in {job.task for job in found}:
            lines = [json.dumps(record) for job, record in self.records.items() if job.task == task]
            write_atomically(self.folder / f"{self.kind}-{task}.json", "[" + ",\n".join(lines) + "]\n")

    def chosen(self, task: str, arm: str, updates: int) -> float | None:
        """The learning rate with the greatest mean accuracy; None before any was tried."""
        areas: dict[float, list[float]] = {}
        for job, record in self.records.items():
            if (job.task, job.arm, job.updates) == (task, arm, updates):
                areas.setdefault(job.learning_rate, []).append(record["area"])
        return max(areas, key=lambda rate: float(np.mean(areas[rate])), default=None)

    def of(self, task: str, arm: str, updates: int) -> dict[int, Record]:
        """Runs by seed."""
        return {j.seed: r for j, r in self.records.items() if (j.task, j.arm, j.updates) == (task, arm, updates)}


def figures(history: Any, n: int, device: str) -> Record:
    """What is kept of run n of a block."""
    kept = {name: [_short(x) for x in np.asarray(getattr(history, name))[n]] for name in KEPT}
    return kept | {"area": _short(np.mean(np.asarray(history.accuracy)[n])), "device": device}


def _short(x: float) -> float | None:
    return float(f"{x:.4g}") if np.isfinite(x) else None
