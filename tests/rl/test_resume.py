"""A training killed at any moment and started again ends as if nothing had happened, to the bit."""

import functools
import json
import multiprocessing
import os
import random
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest

from m1jax.train.meter import MEASURED
from tests.rl import tiny_queue, tiny_run

ROOT = Path(__file__).parents[2]

OF_UPDATES = (
    *("log_ratio_p01", "log_ratio_p50", "log_ratio_p99", "effective", "entropy", "kl_k3", "grad_norm"),
    *("clipped_up", "clipped_down", "clipped_mass_up", "clipped_mass_down"),
)
OF_BATCHES = (
    *("reward", "reward_std", "reward_of_sums", "reward_of_board", "reward_std_of_sums", "reward_std_of_board"),
    *("format", "length", "length_p99", "finish_stop", "finish_length", "finish_repetition", "zero_variance"),
    *("asked", "kept", "staleness", "learning_rate", "pearson", "sampler_gap"),
)


@pytest.fixture(scope="module")
def start():
    """start(directory, kill=None, train=tiny_run.train): a training in a process of its own; status, and what it said.

    Each is forked from one process that has imported everything and computed nothing.
    """
    environment = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rl.tiny_run", "tests.rl.tiny_queue"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        forkserver.ensure_running()

    def start(directory, kill=None, train=tiny_run.train):
        said = directory.with_name("said.txt")
        process = context.Process(target=tiny_run.program, args=(train, directory, said, kill))
        process.start()
        process.join(900)
        return process.exitcode, said.read_text()

    return start


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    status, said = start(directory)
    assert status == 0, said
    return directory


def weights(directory):
    return {file.name: file.read_bytes() for file in (directory / "export").glob("*.safetensors")}


def metrics(directory):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]


def check(start, undisturbed, directory, kills):
    killed = 0
    for kill in kills:
        status, said = start(directory, kill)
        assert status in (0, -signal.SIGKILL), said
        killed += status != 0
    assert killed
    status, said = start(directory)
    assert status == 0, said
    assert weights(directory) == weights(undisturbed)
    assert weights(directory)
    assert metrics(directory) == metrics(undisturbed)


def test_the_undisturbed_run(undisturbed):
    records = metrics(undisturbed)
    assert [r["step"] for r in records if r["phase"] == "sft"] == [3, 6, 9, 10]
    rl = [r for r in records if r["phase"] == "rl"]
    assert [r["step"] for r in rl] == [0, 1, 2, 3, 4]
    assert all("heldout_reward" in rl[i] for i in (0, 2, 4))
    assert sum(r["updates"] for r in rl[1:]) > 4, "too few groups with a difference for this test to mean anything"
    # At the first update the policy is still the one that generated: log-probabilities of prefill + decode and of
    # packed training agree, at the worst token.
    assert all(0 < r["sampler_gap"] < 1e-4 for r in rl[1:2] if r["updates"])
    assert [r["staleness"] for r in rl[1:]] == [0, 1, 1, 1]
    assert {r["window"] for r in rl[1:]} == {12, 16}
    assert rl[-1]["retired"] > 0
    assert any(r["waited"] for r in rl[1:])
    assert all("kl_reference" in r for r in rl[1:] if r["updates"])
    for record in rl[1:]:
        assert all(len(record[f"{name}_by_update"]) == record["updates"] for name in OF_UPDATES)
        assert set(OF_BATCHES) <= record.keys()
    assert (undisturbed / "samples_before.md").exists()
    assert (undisturbed / "samples_after.md").exists()
    assert list((undisturbed / "tensorboard").iterdir())


def test_killed_in_both_phases(start, undisturbed, tmp_path):
    # Record 3 lies in SFT, record 8 from there in RL, while a checkpoint is being written; then in mid-buffer: a batch
    # in flight has some of its groups.
    check(start, undisturbed, tmp_path / "run", [("record", 3, 0.0), ("record", 8, 0.01), ("judge", 2, 0.0)])


@pytest.mark.slow
def test_killed_at_random_moments(start, undisturbed, tmp_path):
    rng = random.Random(0)
    kills = [("record", rng.randint(1, 6), rng.random() * 0.2) for _ in range(12)]
    check(start, undisturbed, tmp_path / "run", kills)


def test_killed_in_mid_window_and_in_mid_update(start, tmp_path):
    """While a batch is written that goes on with responses of the one before, beside an update of another; then in the
    middle of an update."""
    queue = functools.partial(start, train=tiny_queue.train)
    undisturbed = tmp_path / "undisturbed"
    status, said = queue(undisturbed)
    assert status == 0, said
    older = [r["older_tokens"] for r in metrics(undisturbed) if r["step"]]
    assert older[0] == 0
    assert older[3] > 0, "nothing goes on from one batch to the next"
    # The 16th step of the generator belongs to the last batch, the second update from there to the last but one.
    check(queue, undisturbed, tmp_path / "run", [("write", 16, 0.0), ("update", 2, 0.0)])


@pytest.mark.slow
def test_killed_at_random_moments_of_a_window(start, tmp_path):
    queue, rng = functools.partial(start, train=tiny_queue.train), random.Random(0)
    undisturbed = tmp_path / "undisturbed"
    assert queue(undisturbed)[0] == 0
    moments = ("record", "update", "judge", "write")
    kills = [(moment, rng.randint(1, 6), rng.random() * 0.05) for moment in moments]
    check(queue, undisturbed, tmp_path / "run", kills)
