"""`m1jax launch`: one word on what is wrong, devices shared out, and processes that end together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1jax import launch
from m1jax.errors import UserError

ROOT = Path(__file__).parents[1]
MEETING = """
import os, sys, time
import numpy as np
from jax.experimental import multihost_utils
print("devices", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
while True:
    multihost_utils.process_allgather(np.array([0]))
    print("met", flush=True)
    time.sleep(0.1)
"""
COMPLAINT = """
from m1jax.errors import UserError
raise UserError("the data is missing")
"""


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("M1JAX_", "JAX_COORDINATOR"))}
    return clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | more


def start(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *arguments],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in:\n" + "".join(lines))


@pytest.fixture
def script(tmp_path):
    def write(text):
        (tmp_path / "script.py").write_text(text)
        return str(tmp_path / "script.py")

    return write


def shares(monkeypatch, processes, visible, platforms="cuda", devices=None):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return launch._shares(launch.Config(command=("x.py",), processes=processes, devices=devices))


def test_every_process_takes_its_share_of_the_gpus(monkeypatch):
    def taken(processes, visible, platforms="cuda"):
        return [share.get("CUDA_VISIBLE_DEVICES") for share in shares(monkeypatch, processes, visible, platforms)]

    assert taken(2, "0,1") == ["0", "1"]
    assert taken(2, "4,5, 6,7", "") == ["4,5", "6,7"]
    assert taken(2, "MIG-a,MIG-b,-1,3") == ["MIG-a", "MIG-b"]  # CUDA reads no further than -1
    assert taken(1, "0,1", "cuda,cpu") == ["0,1"]
    assert taken(3, "", "") == taken(3, "0,1", "cpu") == [None] * 3
    for processes, possible in ((3, "1, 2"), (4, "1, 2")):
        with pytest.raises(UserError, match=rf"{processes} processes .* 2 GPUs evenly; --processes may be {possible}"):
            taken(processes, "0,1")


def test_devices_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=8")
    wanted = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=4"}
    assert shares(monkeypatch, 3, "0,1", devices=4) == [wanted] * 3


def test_gpus_are_counted_where_nobody_names_them(monkeypatch, tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "Path", lambda _: tmp_path)
    assert launch._gpus() == ["0", "1", "2"]


def test_workers_do_not_outlive_a_killed_launcher(script):
    """And each has its own share of the devices."""
    line = ("m1jax.cli", "launch", "--processes", "2", script(MEETING))
    process = start(*line, CUDA_VISIBLE_DEVICES="2,3", JAX_PLATFORMS="")
    try:
        output = read_until(process, "[1] met")
        assert sorted(re.findall(r"^\[(\d)\] devices (\d)$", output, re.MULTILINE)) == [("0", "2"), ("1", "3")]
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
    finally:
        process.kill()
    process.communicate(timeout=60)  # which ends when nobody can write any more
    deadline = time.monotonic() + 60
    while any(running(worker) for worker in workers):
        assert time.monotonic() < deadline, "they go on"
        time.sleep(0.1)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_survivors_name_the_dead(script):
    """As on a cluster, where nobody watches all processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "M1JAX_PROCESSES": "2"}
    processes = [start("m1jax.launch", script(MEETING), **job, M1JAX_PROCESS_ID=str(number)) for number in range(2)]
    try:
        read_until(processes[0], "met")
        processes[1].send_signal(signal.SIGKILL)
        output, _ = processes[0].communicate(timeout=100)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode not in (0, 2), output
    assert f"m1jax: process 1 (pid {processes[1].pid} on {socket.gethostname()}) is gone" in output


def test_what_all_complain_about_is_said_once(script):
    process = start("m1jax.cli", "launch", "--processes", "2", "--restarts", "1", "--", script(COMPLAINT))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    assert output.count("the data is missing") == 1, output
    assert "restart" not in output  # it would help nobody


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ((), "give a command to run"),
        (("nowhere.py",), "there is no file nowhere.py"),
        (("trian", "sft"), "did you mean 'train sft'"),
        (("train",), "train what"),
        (("--help",), "names no command"),
    ],
)
def test_a_command_that_cannot_run_starts_nothing(monkeypatch, command, says):
    monkeypatch.setattr(launch, "_run", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match=says):
        launch.main(launch.Config(command=command))


def test_an_option_that_is_wrong_is_said_by_the_launcher(monkeypatch, capsys):
    monkeypatch.setattr(launch, "_run", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit, match="2"):
        launch.main(launch.Config(command=("generate", "model", "--promt", "hello")))
    assert "--promt" in capsys.readouterr().err
