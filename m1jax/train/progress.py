"""Live progress: a bar with the latest figures on a terminal, one plain line per step elsewhere."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from m1jax.processes import writes


class Reporter:
    """Shows how far a phase is. A context manager.

    Args:
        title: the phase.
        total: number of steps.
        done: steps made before this process started (resumed runs).
        every_seconds: where the output is no terminal, at most one line in this time (the last step is always shown).
    """

    def __init__(
        self, title: str, total: int, done: int = 0, *, every_seconds: float = 5.0, console: Console | None = None
    ):
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=not writes())
        self._title, self._total = title, total
        self._every, self._last_line = every_seconds, -every_seconds
        self._first: tuple[float, int] | None = None  # when the first step was made, and which it was
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, figures: Mapping[str, float | str]) -> None:
        """Show that `done` steps are made, with the step's figures."""
        text = "  ".join(
            f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in figures.items()
        )
        if self.console.is_terminal:
            self._bar.update(self._task, completed=done, figures=text)
            return
        now = time.monotonic()
        self._first = self._first or (now, done)
        if done < self._total and now - self._last_line < self._every:
            return
        self._last_line = now
        self.console.print(f"{self._title} {done}/{self._total}  {text}  left {self._left(now, done)}")

    def _left(self, now: float, done: int) -> str:
        """At the pace since the first step: that one also compiled, and tells nothing about the others."""
        assert self._first is not None
        began, first = self._first
        if done >= self._total:
            return "0:00"
        if done == first:
            return "unknown"
        left = int((now - began) / (done - first) * (self._total - done))
        return f"{left // 60}:{left % 60:02}"

    def message(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text)
