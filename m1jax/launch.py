"""Several processes as one job: `m1jax launch` starts them on this machine; anywhere else the cluster does.

    m1jax launch --processes 4 -- train sft models/my-model --data train.jsonl     # here
    srun python -m m1jax.launch train sft models/my-model --data train.jsonl       # each process of a cluster

``python -m m1jax.launch`` joins the other processes (through the launcher, SLURM, Kubernetes, Open MPI or a TPU pod),
then runs an m1jax command or a Python file. The engine is JAX's own: ``jax.distributed`` and its coordination service,
which process 0 runs. docs/multihost.md has the launch lines.
"""

import dataclasses
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import Annotated, Any, NoReturn

import tyro

from m1jax.errors import STOPPED, UserError, require_positive

# Set by the launcher, read by `join`. The heartbeat may be set by hand on a cluster.
PROCESSES, PROCESS_ID, HEARTBEAT = "M1JAX_PROCESSES", "M1JAX_PROCESS_ID", "M1JAX_HEARTBEAT_SECONDS"
HEARTBEAT_SECONDS = 20  # JAX's own default of 100 would leave a pod idle for that long when a host dies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Start several processes of one job on this machine and watch them.

    m1jax launch --processes 2 --devices 4 -- train sft models/my-model --data train.jsonl
    """

    command: Annotated[tuple[str, ...], tyro.conf.Positional]
    """What each process runs, after --: an m1jax command and its options, or a Python file and its arguments."""
    processes: int = 2
    """How many."""
    devices: int | None = None
    """CPU devices of each process; leave it out on GPUs."""
    restarts: int = 0
    """How often a job that failed is started again; it goes on from its last checkpoint."""
    heartbeat: int = HEARTBEAT_SECONDS
    """Seconds of silence after which a process counts as dead."""
    patience: int = 300
    """Seconds the processes have to save and leave after SIGTERM or Ctrl-C."""


def main(config: Config) -> None:
    """Runs the job; SIGTERM and Ctrl-C are handed on, so that it can save and leave.

    Raises:
        SystemExit: the job was asked to stop and has saved, with status `STOPPED`.
        UserError: nothing to run, or a process failed (it is named) and no restart is left.
    """
    if config.processes < 1 or not config.command:
        raise UserError("launch: give --processes of at least 1 and, after --, a command")
    require_positive(config, "heartbeat")
    require_positive(config, "restarts", "patience", zero=True)
    if config.devices is not None:
        require_positive(config, "devices")
    for attempt in range(config.restarts + 1):
        failure = _run(config)
        if failure is None:
            return
        if attempt < config.restarts:
            print(f"m1jax launch: {failure}; restart {attempt + 1} of {config.restarts}", file=sys.stderr, flush=True)
    raise UserError(f"launch: {failure}; the job goes on from its last checkpoint when it is started again")


def join() -> None:
    """Makes this process part of the job that the launcher or the cluster started.

    Raises:
        UserError: neither a launcher nor a cluster that JAX knows has said who the others are.
    """
    import jax

    number = {name: int(os.environ[name]) for name in (PROCESSES, PROCESS_ID) if name in os.environ}
    try:
        jax.distributed.initialize(
            num_processes=number.get(PROCESSES),
            process_id=number.get(PROCESS_ID),
            heartbeat_timeout_seconds=int(os.environ.get(HEARTBEAT, HEARTBEAT_SECONDS)),
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        raise UserError(
            f"this process does not know the others of its job ({error}); start it with `m1jax launch`, srun or as "
            "docs/multihost.md shows"
        ) from error


def _run(config: Config) -> str | None:
    """One attempt. Returns what went wrong, or None."""
    port = _free_port()
    started = [_start(config, number, port) for number in range(config.processes)]
    processes = [process for process, _ in started]
    stopping: list[float] = []

    def hand_on(received: int, _frame: Any) -> None:
        stopping.append(time.monotonic())
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    before = {s: signal.signal(s, hand_on) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = next(((number, code) for number, code in enumerate(codes) if code not in (None, 0, STOPPED)), None)
            if failed is not None:
                number, code = failed
                if stopping and code == -signal.SIGTERM:  # before it had begun to listen, or after its end
                    raise SystemExit(STOPPED)
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
                return f"process {number} of {config.processes} (pid {processes[number].pid}) {how}"
            if None not in codes:
                if STOPPED in codes:
                    raise SystemExit(STOPPED)
                return None
            if stopping and time.monotonic() > stopping[0] + config.patience:
                return f"not all processes had left {config.patience} s after the request to stop"
            time.sleep(0.1)
    finally:
        for process in processes:  # the others cannot go on without one of them
            process.kill()
        for process, labels in started:
            process.wait()
            labels.join(timeout=5)  # its last words may be why it failed
        for received, handler in before.items():
            signal.signal(received, handler)


def _start(config: Config, number: int, port: int) -> tuple[subprocess.Popen[str], threading.Thread]:
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        PROCESSES: str(config.processes),
        PROCESS_ID: str(number),
        HEARTBEAT: str(config.heartbeat),
    }
    if config.devices is not None:
        environment["JAX_PLATFORMS"] = "cpu"
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "force_host_platform_device_count" not in f]
        environment["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={config.devices}"])
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "m1jax.launch", *config.command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches them once, through the launcher
    )
    labels = threading.Thread(target=_label, args=(process, number), daemon=True)
    labels.start()
    return process, labels


def _label(process: subprocess.Popen[str], number: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{number}] {line}", end="", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_here(arguments: list[str]) -> NoReturn:
    """Joins the job and runs a command. Leaves at once when it fails: the way out that jax installs would wait for
    processes that in turn wait for this one."""
    status: Any = 0
    try:
        join()
        if arguments and arguments[0].endswith(".py"):
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            sys.argv = ["m1jax", *arguments]
            runpy.run_module("m1jax.cli", run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code
    except UserError as error:
        print(f"m1jax: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 1
    if status is None:
        status = 0
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    if status in (0, STOPPED):
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _run_here(sys.argv[1:])
