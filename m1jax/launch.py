"""Several processes as one job: `m1jax launch` starts them on this machine; anywhere else the cluster does.

    m1jax launch --processes 4 -- train sft models/my-model --data train.jsonl     # here
    srun python -m m1jax.launch train sft models/my-model --data train.jsonl       # each process of a cluster

``python -m m1jax.launch`` joins the other processes (through the launcher, SLURM, Kubernetes, Open MPI or a TPU pod),
then runs an m1jax command or a Python file. The engine is JAX's own: ``jax.distributed`` and its coordination service,
which process 0 runs. docs/multihost.md has the launch lines.
"""

import dataclasses
import itertools
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from m1jax.errors import STOPPED, UserError, require_positive

if TYPE_CHECKING:
    from m1jax.peers import Peers

# Set by the launcher, read by `join`. All but the last may be set by hand on a cluster.
PROCESSES, PROCESS_ID, HEARTBEAT = "M1JAX_PROCESSES", "M1JAX_PROCESS_ID", "M1JAX_HEARTBEAT_SECONDS"
LAUNCHER = "M1JAX_LAUNCHER"  # file descriptor of a pipe that is open for as long as the launcher lives
HEARTBEAT_SECONDS = 20  # JAX's own default of 100 would leave a pod idle for that long when a host dies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Start several processes of one job on this machine and watch them.

    m1jax launch --processes 2 --devices 4 -- train sft models/my-model --data train.jsonl
    """

    command: Annotated[tuple[str, ...], tyro.conf.Positional]
    """What each process runs: an m1jax command and its options, or a Python file and its arguments."""
    processes: int = 2
    """How many."""
    devices: int | None = None
    """CPU devices of each process; without it, each takes its share of the GPUs, or one CPU device where none are."""
    restarts: int = 0
    """How often a job that failed is started again; it goes on from its last checkpoint. One that says what to put
    right (status 2) is not."""
    heartbeat: int = HEARTBEAT_SECONDS
    """Seconds of silence after which a process counts as dead."""
    patience: int = 300
    """Seconds the processes have to save and leave after SIGTERM or Ctrl-C."""


def main(config: Config) -> None:
    """Runs the job; SIGTERM and Ctrl-C are handed on, so that it can save and leave.

    Raises:
        SystemExit: the job was asked to stop and has saved, with status `STOPPED`; or it has said itself what to put
            right, with status 2.
        UserError: nothing to run, or a process failed (it is named) and no restart is left.
    """
    require_positive(config, "processes", "heartbeat")
    require_positive(config, "restarts", "patience", zero=True)
    if config.devices is not None:
        require_positive(config, "devices")
    _check(config.command)
    shares = _shares(config)
    for attempt in range(config.restarts + 1):
        failure = _run(config, shares)
        if failure is None:
            return
        if attempt < config.restarts:
            print(f"m1jax launch: {failure}; restart {attempt + 1} of {config.restarts}", file=sys.stderr, flush=True)
    raise UserError(f"launch: {failure}; the job goes on from its last checkpoint when it is started again")


def _check(command: Sequence[str]) -> None:
    """Looks at the command here, once, instead of letting every process fail on it."""
    from m1jax import cli  # which knows all commands, this one too

    if not command:
        raise UserError("launch: give a command to run, as in m1jax launch --processes 2 -- train sft MODEL ...")
    if command[0].endswith(".py"):
        if not Path(command[0]).is_file():
            raise UserError(f"launch: there is no file {command[0]}")
    elif cli.find(command) is not None:
        cli.parse(command)
    else:
        raise UserError(f"launch: {' '.join(command)} names no command to run; m1jax --help lists all")


def _shares(config: Config) -> list[dict[str, str]]:
    """Environment variables by which each process takes its own devices and no others.

    Raises:
        UserError: the GPUs cannot be shared out evenly.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    gpus = _gpus() if not platforms or {"cuda", "gpu"} & set(platforms.split(",")) else []
    if config.devices is not None:
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "force_host_platform_device_count" not in f]
        flags.append(f"--xla_force_host_platform_device_count={config.devices}")
        return [{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}] * config.processes
    if not gpus:
        return [{}] * config.processes
    size, rest = divmod(len(gpus), config.processes)
    if rest or not size:
        possible = [str(n) for n in range(1, len(gpus) + 1) if len(gpus) % n == 0]
        raise UserError(
            f"launch: {config.processes} processes cannot share out {len(gpus)} GPUs evenly; --processes may be "
            f"{', '.join(possible)}, or --devices N makes them compute on N CPU devices each"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[n * size : (n + 1) * size])} for n in range(config.processes)]


def _gpus() -> list[str]:
    """This host's GPUs that a job may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    names = [name.strip() for name in named.split(",")]
    return list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names))


def join() -> "Peers":
    """Makes this process part of the job that the launcher or the cluster started.

    Returns:
        The other processes; keep it for as long as this one is part of the job.

    Raises:
        UserError: neither a launcher nor a cluster that JAX knows has said who the others are.
    """
    import jax

    number = {name: int(os.environ[name]) for name in (PROCESSES, PROCESS_ID) if name in os.environ}
    try:
        jax.distributed.initialize(
            num_processes=number.get(PROCESSES),
            process_id=number.get(PROCESS_ID),
            # The launcher has said everything, devices too; what is around it (SLURM's shell, say) does not count.
            cluster_detection_method="deactivate" if LAUNCHER in os.environ else None,
            heartbeat_timeout_seconds=int(os.environ.get(HEARTBEAT, HEARTBEAT_SECONDS)),
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        raise UserError(
            f"this process does not know the others of its job ({error}); start it with `m1jax launch`, srun or as "
            "docs/multihost.md shows"
        ) from error
    from m1jax.peers import Peers

    return Peers()


def _run(config: Config, shares: Sequence[dict[str, str]]) -> str | None:
    """One attempt. Returns what went wrong, or None."""
    port, output = _free_port(), _Output()
    ends, alive = os.pipe()  # nothing is written to it: it ends when this process does, however it does
    started = [_start(config, number, port, shares[number], ends, output) for number in range(config.processes)]
    os.close(ends)
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
            # Of several at once, one that was killed: it has taken the others along.
            failures = ((code, number) for number, code in enumerate(codes) if code not in (None, 0, STOPPED))
            failed = min(failures, default=None)
            if failed is not None:
                code, number = failed
                if code == 2:  # it has said what to put right, which starting it again does not
                    raise SystemExit(2)
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
        os.close(alive)
        for received, handler in before.items():
            signal.signal(received, handler)


def _start(
    config: Config, number: int, port: int, share: dict[str, str], ends: int, output: "_Output"
) -> tuple[subprocess.Popen[str], threading.Thread]:
    job = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        PROCESSES: str(config.processes),
        PROCESS_ID: str(number),
        HEARTBEAT: str(config.heartbeat),
        LAUNCHER: str(ends),
    }
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "m1jax.launch", *config.command],
        env=os.environ | job | share,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches them once, through the launcher
        pass_fds=[ends],
    )
    labels = threading.Thread(target=output.show, args=(process, number), daemon=True)
    labels.start()
    return process, labels


class _Output:
    """What the processes write, each line behind the number of its process."""

    def __init__(self) -> None:
        self._lock, self._said = threading.Lock(), set[str]()

    def show(self, process: subprocess.Popen[str], number: int) -> None:
        """Shows all lines of one process; of a complaint that several have in common, the first."""
        assert process.stdout is not None
        for line in process.stdout:
            with self._lock:
                if line not in self._said:
                    print(f"[{number}] {line}", end="", flush=True)
                if line.startswith("m1jax: "):
                    self._said.add(line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_the_launcher() -> None:
    """Where a launcher has started this process, it ends when the launcher does: nobody watches the job any more."""
    if (inherited := os.environ.get(LAUNCHER)) is None:
        return

    def watch() -> None:
        os.read(int(inherited), 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _run_here(arguments: list[str]) -> NoReturn:
    """Joins the job and runs a command. Leaves at once when it fails: the way out that jax installs would wait for
    processes that in turn wait for this one."""
    status: Any = 0
    peers: "Peers | None" = None
    try:
        _end_with_the_launcher()
        peers = join()
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
        for name in peers.gone() if peers else ():
            print(f"m1jax: {name} is gone, and this one cannot go on without it", file=sys.stderr)
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
    if status == 2 and peers and peers.first:
        time.sleep(2)  # the others need its coordination service to come to the same words, and not to an alarm
    os._exit(status)


if __name__ == "__main__":
    _run_here(sys.argv[1:])
