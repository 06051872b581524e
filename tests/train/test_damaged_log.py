"""`m1jax train` goes on from whole checkpoints whatever became of metrics.jsonl, and says what is missing."""

import json
import shutil

import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, cli, save_pretrained
from m1jax.chat import Tokenizer

CONFIG = ModelConfig(
    vocab_size=264,
    hidden_size=8,
    intermediate_size=8,
    layer_types=("lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rotary_dim=2,
    num_experts=2,
    experts_per_token=1,
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """How to start a run whose newest checkpoint is of update 2 of 4, and its directory."""
    home = tmp_path_factory.mktemp("home")
    save_pretrained(MiniMaxM1(CONFIG, rngs=nnx.Rngs(0)), home / "model", tokenizer=Tokenizer.tiny())
    (home / "data.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")

    def train(runs):
        options = ["--steps", "4", "--batch", "1", "--rows", "1", "--row-length", "16"]
        options += ["--log-every", "1", "--checkpoint-every", "2", "--data", str(home / "data.jsonl")]
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
