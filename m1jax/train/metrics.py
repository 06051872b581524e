"""The record of a run: metrics.jsonl is the truth, TensorBoard events and curves are drawn from it."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m1jax.disk import Place, write_atomically, writing

if TYPE_CHECKING:
    from m1jax.train.tensorboard import Events

Record = dict[str, Any]

NAME = "metrics.jsonl"
NON_FINITE = "nonfinite"
"""Key of a line whose values are not all numbers: JSON has none for them, so they stand there as null and here by name,
as "nan", "inf" or "-inf"; {"loss": null, "nonfinite": {"loss": "nan"}}, in a list {"ratios[2]": "inf"}."""

log = logging.getLogger("m1jax.train")


class MetricsLog:
    """Appends one JSON object per step to `metrics.jsonl` and mirrors its numbers to TensorBoard.

    A record is on disk before the checkpoint that contains its step, so a resumed run finds every step before the
    checkpoint; those after it are dropped by `resume` and written again: no step is lost, none doubled. Lines that
    somebody damaged are left out and told; they keep nobody from going on.

    Args:
        directory: the run's directory; made if missing.
        writes: whether this process writes; the others of a job keep `records` only.
    """

    def __init__(self, directory: str | Path, *, writes: bool = True):
        self._directory, self._writes = Path(directory), writes
        self._directory.mkdir(parents=True, exist_ok=True)
        self._place = Place(self._directory)
        self._path = self._directory / NAME
        self._events: Events | None = None
        self.records: list[Record] = []
        self._damaged: list[int] = []
        for number, record in _lines(self._path):
            if record is None:
                self._damaged.append(number)
            else:
                self.records.append(record)

    def count(self, phase: str) -> int:
        """How many records a phase has; a checkpoint that keeps this number can tell whether some went missing."""
        return len(self.of(phase))

    def resume(self, phase: str, step: int, count: int | None = None) -> None:
        """Forget what was logged in this phase after `step` (the step of the checkpoint that was restored; -1:
        everything).

        Args:
            phase: which.
            step: the last to keep.
            count: how many records the phase had at that checkpoint, where it is known. Those that are missing, for
                whatever reason, are told in the log.

        Raises:
            UserError: the log cannot be written.
        """
        self.records = [r for r in self.records if r["phase"] != phase or r["step"] <= step]
        if not self._writes:
            return
        with writing(self._path):
            if self._damaged:
                kept = self._set_aside()
                numbers = ", ".join(map(str, self._damaged[:10])) + (", ..." if len(self._damaged) > 10 else "")
                log.warning("%s: no records in line %s; left out, the file as it was is %s", self._path, numbers, kept)
                self._damaged = []
            if count is not None and (missing := count - self.count(phase)) > 0:
                log.warning(
                    "%s: %d of %d records of phase %r up to step %d are missing: the file was changed or removed. "
                    "Checkpoints are whole, training goes on",
                    *(self._path, missing, count, phase, step),
                )
            write_atomically(self._path, "".join(line(record) + "\n" for record in self.records))
        # TensorBoard keeps what it once read from an event file: only fresh files are free of the dropped steps.
        self.close()
        shutil.rmtree(self._directory / "tensorboard", ignore_errors=True)
        self._to_tensorboard(self.records)

    def append(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one record, forced to disk. Values: numbers, or lists of numbers (not shown in TensorBoard).

        Raises:
            UserError: the disk is full, or the run's directory is no longer there.
        """
        record = {"phase": phase, "step": step, **values}
        self.records.append(record)
        if not self._writes:
            return
        self._place.check()
        with writing(self._path), open(self._path, "a") as file:
            file.write(line(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._to_tensorboard([record])

    def of(self, phase: str) -> list[Record]:
        return [record for record in self.records if record["phase"] == phase]

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _set_aside(self) -> Path:
        """Copies the log, damage and all, to a name that is free."""
        number = 1
        while (kept := self._path.with_suffix(f".damaged-{number}.jsonl")).exists():
            number += 1
        write_atomically(kept, self._path.read_bytes())
        return kept

    def _to_tensorboard(self, records: Sequence[Record]) -> None:
        if not records:
            return
        if self._events is None:
            from m1jax.train.tensorboard import Events

            self._events = Events(self._directory / "tensorboard")
        for record in records:
            numbers = {k: v for k, v in record.items() if k not in ("phase", "step") and isinstance(v, int | float)}
            self._events.add(record["step"], {f"{record['phase']}/{name}": v for name, v in numbers.items()})
        self._events.flush()


def line(record: Mapping[str, Any]) -> str:
    """A record as it stands in the file: JSON, whatever was measured (`NON_FINITE`)."""
    values, marks = {}, {}

    def finite(name: str, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            marks[name] = str(value)
            return None
        return value

    for name, value in record.items():
        if isinstance(value, list):
            values[name] = [finite(f"{name}[{i}]", element) for i, element in enumerate(value)]
        else:
            values[name] = finite(name, value)
    return json.dumps(values | ({NON_FINITE: marks} if marks else {}), allow_nan=False)


def _record(content: bytes) -> Record | None:
    """The inverse of `line`; None if that is no record."""
    try:
        record = json.loads(content.decode())
        for mark, value in record.pop(NON_FINITE, {}).items():
            name, _, index = mark.partition("[")
            if index:
                record[name][int(index.rstrip("]"))] = float(value)
            else:
                record[name] = float(value)
        whole = isinstance(record["phase"], str) and isinstance(record["step"], int)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record if whole else None


def _lines(path: Path) -> Iterator[tuple[int, Record | None]]:
    """(line number, record or None where it is damaged). Half a line at the end, as a killed process leaves it, is
    nothing: no checkpoint lies behind it."""
    if not path.exists():
        return
    *lines, last = path.read_bytes().split(b"\n")
    for number, content in enumerate(lines, 1):
        if content.strip():
            yield number, _record(content)
    if (record := _record(last)) is not None:
        yield len(lines) + 1, record


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
