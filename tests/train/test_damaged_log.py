"""`m1jax train` goes on from whole checkpoints whatever became of metrics.jsonl, and says what is missing."""

import json
import shutil

import pytest

from m1jax import cli
from tests import tiny
from tests.train.test_loop import COMMAND


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """How to start a run whose newest checkpoint is of update 2 of 4, and its directory."""
    home = tmp_path_factory.mktemp("home")
    tiny.save(home / "model")
    (home / "data.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")

    def train(runs):
        options = [*COMMAND, "--steps", "4", "--log-every", "1", "--checkpoint-every", "2"]
        options += ["--data", str(home / "data.jsonl")]
        cli.main(["train", "sft", str(home / "model"), *options, "--runs", str(runs), "--name", "x"])
        return [json.loads(line)["step"] for line in (runs / "x" / "metrics.jsonl").read_text().splitlines()]

    assert train(home / "runs") == [1, 2, 3, 4]
    shutil.rmtree(home / "runs/x/checkpoints/sft/4")
    return train, home / "runs"


def remove(file):
    file.unlink()


def spoil(file):
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + bytes(200) + b"\xff\n" + b"".join(lines[2:]))


@pytest.mark.parametrize(
    ("damage", "left", "says"),
    [
        (lambda file: None, [1, 2], None),
        (remove, [], "2 of 2 records of phase 'sft' up to step 2 are missing"),
        (spoil, [1], "no records in line 2; left out"),
    ],
)
def test_training_goes_on(stopped, tmp_path, caplog, damage, left, says):
    train, runs = stopped
    shutil.copytree(runs, tmp_path / "runs")
    damage(tmp_path / "runs/x/metrics.jsonl")
    assert train(tmp_path / "runs") == [*left, 3, 4]
    assert says in caplog.text if says else not caplog.text
