"""Jobs of several processes, really run: the result of one process, deaths, restarts, SIGTERM."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests/multihost/worker.py"


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("M1JAX_", "JAX_COORDINATOR"))}
    return clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


def launch(directory, processes, devices, *arguments, options=(), wait=True):
    """`m1jax launch` on the worker. Its command line is not used: the launcher is not yet everywhere a command."""
    config = f"processes={processes}, devices={devices}, heartbeat=10" + "".join(f", {o}" for o in options)
    command = ", ".join(repr(str(a)) for a in (WORKER, directory, *arguments))
    code = (
        "from m1jax.errors import UserError\nfrom m1jax.launch import Config, main\nimport sys\n"
        f"try:\n    main(Config({config}, command=({command})))\nexcept UserError as e:\n    sys.exit(f'm1jax: {{e}}')"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def results(directory):
    return [json.loads(p.read_text()) for p in sorted(directory.glob("result-*.json"))]


def read_until(process, text, seconds=200):
    """Lines of the output up to the first with `text`, as one string."""
    lines, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if not line:
            break
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in:\n" + "".join(lines))


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def one_process(directory, kind, steps):
    """The reference: a process of its own, with one device."""
    code = f"import sys; sys.argv = ['', {str(directory)!r}, {kind!r}, '', '{steps}']; "
    code += f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"
    subprocess.run(
        [sys.executable, "-c", code], env=environment(XLA_FLAGS=""), check=True, timeout=200, capture_output=True
    )
    return results(directory)[0]


def check_equal(got, want):
    np.testing.assert_allclose(got["losses"], want["losses"][got["start"] :], rtol=1e-5)
    np.testing.assert_allclose(got["norms"], want["norms"], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    want = one_process(tmp_path / "one", "sft", 2)
    launch(tmp_path / "two", 2, 2, "sft", "fsdp=2,tensor=2", 2)
    first, second = results(tmp_path / "two")
    check_equal(first, want)
    check_equal(second, want)
    assert (first["rows"], second["rows"]) == ([0, 1], [2, 3])  # each read its share


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rl"])
@pytest.mark.parametrize(
    ("processes", "mesh"), [(2, "expert=2,tensor=2"), (4, "data=2,fsdp=2"), (4, "sequence=2,tensor=2")]
)
def test_several_processes_give_the_result_of_one(tmp_path, kind, processes, mesh):
    (tmp_path / "one").mkdir()
    (tmp_path / "all").mkdir()
    want = one_process(tmp_path / "one", kind, 2)
    launch(tmp_path / "all", processes, 4 // processes, kind, mesh, 2)
    assert len(results(tmp_path / "all")) == processes
    for got in results(tmp_path / "all"):
        check_equal(got, want)


@pytest.mark.slow
def test_a_job_goes_on_with_other_processes_and_another_mesh(tmp_path):
    """Written by 4 processes, continued by 2, then by 1: the end is that of an undisturbed run in one process."""
    (tmp_path / "one").mkdir()
    (tmp_path / "job").mkdir()
    want = one_process(tmp_path / "one", "sft", 6)
    launch(tmp_path / "job", 4, 1, "sft", "fsdp=4", 2)
    launch(tmp_path / "job", 2, 2, "sft", "expert=2,tensor=2", 4)
    assert results(tmp_path / "job")[0]["start"] == 2
    launch(tmp_path / "job", 1, 2, "sft", "tensor=2", 6)
    got = results(tmp_path / "job")[0]
    assert got["start"] == 4
    check_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_named_and_the_restart_loses_nothing(tmp_path, victim):
    """Worker or coordinator killed: the launcher says which, and the restarted job ends as if nothing had happened."""
    (tmp_path / "one").mkdir()
    (tmp_path / "job").mkdir()
    want = one_process(tmp_path / "one", "sft", 8)
    process = launch(tmp_path / "job", 2, 1, "sft", "fsdp=2", 8, 1.0, options=["restarts=1"], wait=False)
    output = read_until(process, "update 6")
    os.kill(sorted(descendants(process.pid))[victim], signal.SIGKILL)
    output += process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert re.search(rf"process {victim} of 2 \(pid \d+\) was killed by SIGKILL", output), output
    assert results(tmp_path / "job")[0]["start"] in (2, 4, 6)  # checkpoints are written while updates go on
    check_equal(results(tmp_path / "job")[0], want)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_without_a_launcher_the_others_stop_within_a_minute(tmp_path, victim):
    """As on a cluster, where nobody watches all hosts: only JAX's heartbeat and broken connections tell."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-u", "-m", "m1jax.launch", str(WORKER), str(tmp_path), "sft", "fsdp=2", "60", "1"],
            env=environment(
                XLA_FLAGS="--xla_force_host_platform_device_count=1",
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                M1JAX_PROCESSES="2",
                M1JAX_PROCESS_ID=str(number),
                M1JAX_HEARTBEAT_SECONDS="20",
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for number in range(2)
    ]
    try:
        read_until(processes[1], "update 2")
        processes[victim].kill()
        killed = time.monotonic()
        output, _ = processes[1 - victim].communicate(timeout=60)
        print(f"stopped {time.monotonic() - killed:.1f} s after")
        assert processes[1 - victim].returncode != 0, output
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_sigterm_saves_and_leaves(tmp_path):
    (tmp_path / "job").mkdir()
    process = launch(tmp_path / "job", 2, 1, "sft", "fsdp=2", 60, 1.0, wait=False)
    read_until(process, "update 3")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    saved = {int(n) for n in re.findall(r"saved update (\d+), leaving as asked", output)}
    assert len(saved) == 1, output  # both at the same update
    more = launch(tmp_path / "job", 1, 1, "sft", "", max(saved) + 1)
    assert f"update {max(saved) + 1} loss" in more
    assert results(tmp_path / "job")[0]["start"] == max(saved)
