"""A run's directory belongs to one process at a time, and says what to do where it cannot be used."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m1jax.errors import UserError
from m1jax.train.run import Run

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
