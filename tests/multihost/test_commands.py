"""`m1jax train pretrain`, `sft` and `rl` on meshes and in several processes give the result of one device."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, cli, save_pretrained
from m1jax.chat import Tokenizer
from m1jax.disk import LOCK, Lock
from m1jax.rl.tasks import get_task
from m1jax.train.meter import MEASURED

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    vocab_size=263,  # no axis divides it
    hidden_size=16,
    intermediate_size=16,
    layer_types=("lightning", "softmax"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_experts=4,
    experts_per_token=2,
    initializer_range=0.1,
)
OPTIMIZER = ["--learning-rate", "1e-3", "--eps", "1e-8"]
SFT = ["--steps", "6", "--batch", "8", "--row-length", "64", "--rows", "8", "--log-every", "1"]
SFT += ["--checkpoint-every", "1", "--warmup-steps", "2", *OPTIMIZER]
PRETRAIN = ["--context", "32:3,64", "--steps", "6", "--batch-tokens", "1024", "--micro-batch-tokens", "512"]
PRETRAIN += ["--log-every", "1", "--checkpoint-every", "1", "--warmup-steps", "2", *OPTIMIZER]
RL = ["--iterations", "2", "--prompts", "8", "--samples", "4", "--updates", "2", "--rounds", "1", "--rows", "8"]
RL += ["--no-chat", "--max-prompt-tokens", "24", "--max-new-tokens", "8"]
RL += ["--row-length", "32", "--evaluate-rounds", "1", *OPTIMIZER]


def slow(kind):
    return pytest.param(kind, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and data for it."""
    home = tmp_path_factory.mktemp("files")
    save_pretrained(MiniMaxM1(CONFIG, rngs=nnx.Rngs(0)), home / "model")
    Tokenizer.tiny().save(home / "model")
    task, rng = get_task("sums"), np.random.default_rng(0)
    problems = [task.problem("train", 0, i) for i in range(16)]
    pairs = [{"prompt": p.prompt, "answer": p.demonstration(bool(rng.integers(2)))} for p in problems]
    (home / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # So small a model is never right: what it writes must differ in something, or there is nothing to learn.
    (home / "reward.py").write_text("def even(response): return sum(ord(letter) % 2 == 0 for letter in response) / 8\n")
    documents = [{"text": " ".join(pair["answer"] for pair in pairs[i:])} for i in range(16)]
    (home / "web.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return home


def command(files, kind, runs, name, *options):
    recipes = {
        "pretrain": ["--data", f"{files}/web.jsonl", *PRETRAIN],
        "sft": ["--data", f"{files}/data.jsonl", *SFT],
        "rl": ["--task", "sums", "--reward", f"{files}/reward.py:even", *RL],
    }
    return [
        "train",
        kind,
        str(files / "model"),
        *recipes[kind],
        "--runs",
        str(runs),
        "--name",
        name,
        *map(str, options),
    ]


@pytest.fixture(scope="module")
def one_device(files, tmp_path_factory):
    runs = tmp_path_factory.mktemp("one")

    @functools.cache
    def run(kind):
        cli.main(command(files, kind, runs, kind))
        return runs / kind

    return run


def launch(processes, devices, arguments, *options):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("M1JAX_", "JAX_COORDINATOR"))}
    line = [sys.executable, "-u", "-m", "m1jax.cli", "launch", "--processes", str(processes), "--devices", str(devices)]
    line += ["--heartbeat", "200"]  # a crowded machine may let a process wait for long
    return subprocess.Popen(
        [*line, *options, "--", *arguments],
        env=clean | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launched(*arguments):
    process = launch(*arguments)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_equal(run, want):
    """All metrics, and what a training leaves behind."""
    got, expected = records(run), records(want)
    assert [(r["phase"], r["step"], sorted(r)) for r in got] == [(r["phase"], r["step"], sorted(r)) for r in expected]
    for a, b in zip(got, expected):
        for name in sorted(a.keys() - {"phase", *MEASURED}):
            # Quantiles come from a histogram: what rounding moves into the next bin moves them by a part of its 5e-3.
            atol = 1e-3 if name.startswith("log_ratio_p") else 1e-6
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=atol, err_msg=f"{name} at step {a['step']}")
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in want.iterdir())
    assert len(list((run / "tensorboard").iterdir())) == 1  # one process wrote


@pytest.mark.parametrize("kind", [slow("pretrain"), slow("sft"), "rl"])
def test_eight_devices(files, one_device, tmp_path, kind):
    cli.main(command(files, kind, tmp_path, kind, "--mesh", "fsdp=2,expert=2,tensor=2"))
    check_equal(tmp_path / kind, one_device(kind))


@pytest.mark.parametrize("kind", [slow("pretrain"), "sft", slow("rl")])
def test_two_processes(files, one_device, tmp_path, kind):
    output = launched(2, 2, command(files, kind, tmp_path, kind, "--mesh", "fsdp=2,tensor=2"))
    check_equal(tmp_path / kind, one_device(kind))
    progress = re.findall(rf"^\[(\d)\] {kind} ", output, re.MULTILINE | re.IGNORECASE)
    assert set(progress) == {"0"}, output  # one process reports


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "sft", "rl"])
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2", "expert=2,tensor=2", "sequence=2,fsdp=2"])
def test_four_processes(files, one_device, tmp_path, kind, mesh):
    launched(4, 1, command(files, kind, tmp_path, kind, "--mesh", mesh))
    check_equal(tmp_path / kind, one_device(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "sft", "rl"])
def test_sigterm_and_a_restart_elsewhere(files, one_device, tmp_path, kind):
    """SIGTERM to a job of two processes: status 143, and one process on another mesh goes on to the same end."""
    process = launch(2, 2, command(files, kind, tmp_path, kind, "--mesh", "fsdp=4"))
    assert process.stdout is not None
    output = ""
    while not re.search(r" 1/|held-out reward before", output):
        line = process.stdout.readline()
        assert line, output
        output += line
    process.send_signal(signal.SIGTERM)
    output += process.communicate(timeout=200)[0]
    assert process.returncode == 143, output
    assert "is saved; the same command goes on from there" in output
    assert not (tmp_path / kind / "export").exists()
    cli.main(command(files, kind, tmp_path, kind, "--mesh", "expert=4,tensor=2"))
    check_equal(tmp_path / kind, one_device(kind))


def test_what_a_mesh_cannot_shard_is_refused_at_the_start(files, tmp_path, capsys):
    for mesh, says in (
        ("tensor=8", "tensor = 8 cannot shard this model: it does not divide num_heads = 4; the nearest that work: 2"),
        ("data=4,fsdp=3", "is for 12 devices, but there are 8"),
        ("tenser=8", "axis 'tenser' is unknown"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(command(files, "sft", tmp_path, "refused", "--mesh", mesh))
        assert says in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_all_processes(files, tmp_path):
    (tmp_path / "sft").mkdir()
    held = Lock(tmp_path / "sft")
    process = launch(2, 1, command(files, "sft", tmp_path, "sft", "--mesh", "fsdp=2"))
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 2, output
    assert re.search(rf"sft is in use: process {os.getpid()} on ", output), output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "sft").iterdir()] == [LOCK]
    del held
