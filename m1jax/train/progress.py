"""Live progress: a bar with the latest figures on a terminal, one plain line per step elsewhere."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


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
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._title, self._total, self._first = title, total, done
        self._every, self._start, self._last_line = every_seconds, time.monotonic(), -every_seconds
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
        if done < self._total and now - self._last_line < self._every:
            return
        self._last_line = now
        rate = (now - self._start) / max(done - self._first, 1)
        left = int(rate * (self._total - done))
        self.console.print(f"{self._title} {done}/{self._total}  {text}  left {left // 60}:{left % 60:02}")

    def message(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text)
