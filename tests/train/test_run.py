"""A run's directory belongs to one process at a time, and says what to do where it cannot be used; a run goes on with
what cannot change its result as one likes, and with nothing else changed."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m1jax.errors import UserError
from m1jax.train.run import Branch, Run, free, run_directory

ROOT = Path(__file__).parents[2]
TRAINING = """
import sys, time
from m1jax.train.run import Run
run = Run(sys.argv[1], {"seed": 0})
run.log.append("sft", 1, {"loss": 1.0})
print("training", flush=True)
time.sleep(600)
"""


def test_a_second_run_in_the_directory_is_refused_until_the_first_is_gone(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "training\n"
        before = (tmp_path / "run/metrics.jsonl").read_text()
        with pytest.raises(UserError, match=rf"run is in use: process {first.pid} on .*choose another name") as error:
            Run(tmp_path / "run", {"seed": 1})
        assert "\n" not in str(error.value)
        assert (tmp_path / "run/config.json").read_text() == '{\n  "seed": 0\n}\n'
        assert (tmp_path / "run/metrics.jsonl").read_text() == before
        Run(tmp_path / "another", {"seed": 1})
    finally:
        first.kill()
        first.communicate()
    again = Run(tmp_path / "run", {"seed": 0})
    assert [record["step"] for record in again.log.records] == [1]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_where_nothing_may_be_written_nothing_is_to_be_removed(tmp_path, monkeypatch, number):
    def refuse(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        with pytest.raises(UserError, match=r"(not permitted|read-only).*choose another place") as error:
            Run(tmp_path / "run", {"seed": 0})
    assert "remove" not in str(error.value)
    assert str(tmp_path / "run") in str(error.value)


def test_the_directory_of_checkpoints_is_there_from_the_beginning(tmp_path):
    run = Run(tmp_path / "run", {"seed": 0})
    assert run.checkpoints_of("sft").is_dir()
    Run(tmp_path / "run", {"seed": 1})  # nothing was saved yet


def test_damaged_settings_cost_no_checkpoints(tmp_path):
    run = Run(tmp_path / "run", {"seed": 0})
    (run.checkpoints_of("sft") / "10").mkdir()
    (tmp_path / "run/config.json").write_bytes(b'{"seed": \xff')
    with pytest.raises(UserError, match=r"config.json is damaged \(.*remove that file to go on"):
        Run(tmp_path / "run", {"seed": 0})
    (tmp_path / "run/config.json").unlink()
    Run(tmp_path / "run", {"seed": 0})
    assert (tmp_path / "run/checkpoints/sft/10").is_dir()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    rows: int = free(8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    inner: Inner = dataclasses.field(default_factory=Inner)
    every: int = free(10)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"model": Path("model"), "data": [(Path("a.jsonl"), 2.0)], "seed": 0, "recipe": Recipe()}

    def start(branch=None, **changes):
        return Run("runs/x", settings | changes, branch=branch)

    (start().checkpoints_of("sft") / "10").mkdir()
    return start


def test_what_cannot_change_the_result(start, tmp_path):
    start(recipe=Recipe(every=3, inner=Inner(rows=2)))
    kept = json.loads(Path("runs/x/config.json").read_text())
    assert kept["recipe"] == {"inner": {"rate": 0.1, "rows": 2}, "every": 3}
    # However a path is spelt, and from wherever.
    start(model=tmp_path / "model", data=[(tmp_path / "." / "a.jsonl", 2.0)])
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    Run(
        tmp_path / "runs/x",
        {"model": Path("../model"), "data": [(Path("../a.jsonl"), 2.0)], "seed": 0, "recipe": Recipe()},
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(seed=1), "seed is 0 there and 1 now"),
        (dict(recipe=Recipe(inner=Inner(rate=0.2))), r"recipe\.inner\.rate is 0\.1 there and 0\.2 now"),
        (dict(model=Path("other")), "model is '.*/model' there and 'other' now"),
        (dict(data=[(Path("a.jsonl"), 1.0)]), r"data\[0\]\[1\] is 2\.0 there and 1\.0 now"),
        (dict(data=[]), "data is .* there and \\[\\] now"),
        (dict(branch=Branch(Path("runs/x"), 10)), "from is None there"),
    ],
)
def test_what_can(start, changes, says):
    with pytest.raises(UserError, match=says):
        start(**changes)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/../../x", "/tmp/x", "x "])
def test_a_name_leads_nowhere_else(name):
    with pytest.raises(UserError, match="a run needs a name of its own below runs/"):
        run_directory(Path("runs"), name)


def test_names():
    assert run_directory(Path("runs"), "first") == Path("runs/first")
    assert run_directory(Path("runs"), "group/first") == Path("runs/group/first")


def test_where_to_branch_off(start):
    assert Branch.parse("runs/x") == (Path("runs/x"), None)
    assert Branch.parse("runs/x:10") == (Path("runs/x"), 10)
    with pytest.raises(UserError, match="--from runs/y:3: runs/y holds no checkpoints"):
        Branch.parse("runs/y:3")
