"""The time left is a guess from steps that only trained."""

import io

from rich.console import Console

from m1jax.train import progress


def test_the_first_step_compiles_and_is_no_measure(monkeypatch):
    clock = iter([60.0, 62.0, 64.0, 300.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    written = io.StringIO()
    reporter = progress.Reporter("SFT", 100, 10, every_seconds=0, console=Console(file=written, width=80))
    for done in (11, 12, 13, 100):
        reporter.update(done, {})
    assert [line.split("left ")[1] for line in written.getvalue().splitlines()] == ["unknown", "2:56", "2:54", "0:00"]
