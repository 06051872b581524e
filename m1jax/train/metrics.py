"""The record of a run: metrics.jsonl is the truth, TensorBoard events and curves are drawn from it."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class MetricsLog:
    """Appends one JSON object per step to `metrics.jsonl` and mirrors its numbers to TensorBoard.

    A record is on disk before the checkpoint that contains its step, so a resumed run finds every step before the
    checkpoint; those after it are dropped by `resume` and written again: no step is lost, none doubled.

    Args:
        directory: the run's directory; made if missing.
        writes: whether this process writes; the others of a job keep `records` only.
    """

    def __init__(self, directory: str | Path, *, writes: bool = True):
        self._directory, self._writes = Path(directory), writes
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path = self._directory / "metrics.jsonl"
        self._events: Any = None
        self.records: list[Record] = _read(self._path)

    def resume(self, phase: str, step: int) -> None:
        """Forget what was logged in this phase after `step` (the step of the checkpoint that was restored; -1:
        everything)."""
        self.records = [r for r in self.records if r["phase"] != phase or r["step"] <= step]
        if not self._writes:
            return
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        os.replace(temporary, self._path)
        # TensorBoard keeps what it once read from an event file: only fresh files are free of the dropped steps.
        self.close()
        shutil.rmtree(self._directory / "tensorboard", ignore_errors=True)
        for record in self.records:
            self._to_tensorboard(record)

    def append(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one record, forced to disk. Values: numbers, or lists of numbers (not shown in TensorBoard)."""
        record = {"phase": phase, "step": step, **values}
        self.records.append(record)
        if not self._writes:
            return
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._to_tensorboard(record)

    def of(self, phase: str) -> list[Record]:
        return [record for record in self.records if record["phase"] == phase]

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _to_tensorboard(self, record: Record) -> None:
        if self._events is None:
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(str(self._directory / "tensorboard"))
        for name, value in record.items():
            if name not in ("phase", "step") and isinstance(value, int | float):
                self._events.add_scalar(f"{record['phase']}/{name}", value, record["step"])


def _read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            # A process killed while writing leaves half a line, and it can only be the last one.
            if number < len(lines) - 1:
                raise
    return records


def draw_curves(records: Sequence[Record], panels: Sequence[tuple[str, str, Sequence[str]]], path: str | Path) -> None:
    """Draw metrics over steps.

    Args:
        records: as `MetricsLog.records`.
        panels: (title, phase, names of metrics) for each picture.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    for i, (title, phase, names) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name in names:
            points = [(r["step"], r[name]) for r in records if r["phase"] == phase and r.get(name) is not None]
            if points:
                axes.plot(*zip(*points), marker="o" if len(points) < 15 else "", label=name)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))
