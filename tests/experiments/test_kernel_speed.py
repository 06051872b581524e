"""The speed experiment's README says what its results say."""

import json
from pathlib import Path

from experiments.kernel_speed import kernel_speed

FOLDER = Path(kernel_speed.__file__).parent


def test_readme_shows_the_results(tmp_path):
    rows = json.loads((FOLDER / "results.json").read_text())
    readme = (FOLDER / "README.md").read_text().splitlines()
    table = [line for line in kernel_speed.table(rows).splitlines() if line.startswith("|")]
    assert len(table) > 20
    assert set(table) <= set(readme)
    kernel_speed.picture(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_one_failure_loses_only_itself(tmp_path):
    rows = kernel_speed.Rows(tmp_path / "part.json", "part")
    rows.add(what="first", ms=1.0)
    with rows.attempt(what="second"):
        raise MemoryError("too large")
    rows.add(what="third", ms=3.0)
    first, second, third = json.loads((tmp_path / "part.json").read_text())
    assert (first["ms"], third["ms"]) == (1.0, 3.0)
    assert second["failed"] == "MemoryError: too large"
