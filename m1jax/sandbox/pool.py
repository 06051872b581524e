"""Programs in parallel: workers that keep a sandbox ready, one program at a time each."""

import contextlib
import json
import os
import queue
import site
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m1jax.errors import UserError
from m1jax.sandbox.limits import Limits, Result
from m1jax.sandbox.refusal import explain, unsupported
from m1jax.sandbox.view import view

_ZYGOTE = Path(__file__).with_name("zygote")
_SCRATCH = "/scratch"
# The same program has the same result, and leaves nothing behind.
_PYTHON = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
_START_SECONDS = 60.0
# Beyond a program's own limit: a worker that has not answered by then never will.
_GRACE_SECONDS = 30.0


def run(command: str | Sequence[str], *, stdin: str = "", limits: Limits | None = None) -> Result:
    """Runs one program in a sandbox made for it; `Pool` runs many faster.

    Args:
        command: the text of a Python program, or a program of this machine with its arguments, such as
            `["gcc", "--version"]`; `python` and `python3` mean the interpreter that runs this code, with its packages.
            It runs in an empty scratch folder, in memory, the only place that it can write to.
        stdin: what it reads.
        limits: `Limits()` unless given.

    Raises:
        UserError: the command is empty or has a NUL character in it.
    """
    with contextlib.closing(_Worker()) as worker:
        return worker.run(_Job(command, stdin, limits))


def require() -> None:
    """Asks whether programs can be isolated here.

    Raises:
        UserError: they cannot; the message says what to install or allow.
    """
    result = run(["true"])
    if result.reason != "ok":
        raise UserError(f"sandbox: {result.stderr}")


class Pool:
    """Workers that run programs in parallel, one each at a time, every program in namespaces and a folder of its own.

    `run` may be called from many threads; a call waits for a worker to be free. A worker that dies is replaced, and its
    program run once more.

    Args:
        workers: how many; as many as there are processors for this process unless given.

    Raises:
        UserError: programs cannot be isolated here; the message says what to install or allow.
    """

    def __init__(self, workers: int | None = None):
        count = len(os.sched_getaffinity(0)) if workers is None else workers
        if count < 1:
            raise UserError(f"sandbox: workers = {workers} must be at least 1")
        self._workers = [_Worker() for _ in range(count)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        refusal = self._workers[0].start()
        if refusal is not None:
            raise UserError(f"sandbox: {refusal}")

    def run(self, command: str | Sequence[str], *, stdin: str = "", limits: Limits | None = None) -> Result:
        """As `m1jax.sandbox.run`.

        Raises:
            UserError: also when the pool is closed, before or meanwhile.
        """
        job = _Job(command, stdin, limits)
        worker = self._idle.get()
        try:
            return worker.run(job)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the workers and with them what still runs."""
        for worker in self._workers:
            worker.close(for_good=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Job:
    """A program in the form that a worker takes."""

    def __init__(self, command: str | Sequence[str], stdin: str, limits: Limits | None):
        self.limits = limits or Limits()
        source = b""
        if isinstance(command, str):
            source = command.encode("utf-8", "replace")
            command = []
        elif not command or not command[0]:
            raise UserError("sandbox: the command is empty")
        if any("\0" in word for word in command):
            raise UserError("sandbox: the command has a NUL character in it, which no program can be given")
        text = stdin.encode("utf-8", "replace")
        self.head = {
            "command": list(command),
            "environment": _environment(),
            "source": len(source),
            "stdin": len(text),
            **vars(self.limits),
        }
        self.body = source + text


def _environment() -> dict[str, str]:
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": _SCRATCH,
        "TMPDIR": _SCRATCH,
        "LANG": "C.UTF-8",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        **_PYTHON,
    }


class _Died(Exception):
    """The worker, not the program."""


class _Worker:
    """One process of the zygote, started when it is first needed."""

    def __init__(self):
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False
        self._lock = threading.Lock()
        """held while the process comes and goes: a pool is closed from another thread than those that run programs"""

    def run(self, job: _Job) -> Result:
        """Runs a program; starts the worker where there is none, and once more where it dies."""
        for _ in range(2):
            refusal = self.start()
            if refusal is not None:
                return Result(None, "", refusal, "refused")
            try:
                return self._ask(job)
            except (_Died, OSError):
                self.close()
        return Result(None, "", "the sandbox's worker died twice while it ran this program", "error")

    def start(self) -> str | None:
        """Starts the process unless it is there; if this system refuses, why."""
        if self._process is not None:
            return None
        reason = unsupported()
        if reason is not None:
            return reason
        seen = view()
        setup = json.dumps({"folders": seen.folders, "links": seen.links, "packages": site.getsitepackages()})
        with self._lock:
            if self._closed:
                raise UserError("sandbox: the pool is closed")
            self._control, theirs = socket.socketpair()
            with theirs:
                # Its own session, so that the terminal's Ctrl-C is ours alone to handle.
                self._process = subprocess.Popen(
                    [sys.executable, "-S", "-s", str(_ZYGOTE), str(theirs.fileno()), setup],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=_PYTHON,
                    cwd="/",
                    start_new_session=True,
                )
        try:
            self._control.settimeout(_START_SECONDS)
            answer = _receive(self._control)
        except (_Died, OSError):
            self.close()
            return "its worker process did not start; what it wrote to stderr says why"
        if "refused" in answer:
            self.close()
            return explain(answer["refused"])
        return None

    def close(self, *, for_good: bool = False) -> None:
        with self._lock:
            self._closed |= for_good
            process, self._process = self._process, None
            control, self._control = self._control, None
        if control is not None:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)  # which another thread that reads from it notices
            control.close()
        if process is not None:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ask(self, job: _Job) -> Result:
        control = self._control
        if control is None:
            raise _Died
        head = json.dumps(job.head).encode()
        control.settimeout(job.limits.wall_seconds + _GRACE_SECONDS)
        control.sendall(struct.pack("=I", len(head)) + head + job.body)
        answer = _receive(control)
        stdout, stderr = (_read(control, answer[name]).decode("utf-8", "replace") for name in ("stdout", "stderr"))
        if answer["reason"] == "refused":
            return Result(None, "", explain(stderr), "refused")
        return Result(answer["status"], stdout, stderr, answer["reason"])


def _receive(control: socket.socket) -> dict[str, Any]:
    return json.loads(_read(control, struct.unpack("=I", _read(control, 4))[0]))


def _read(control: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = control.recv(size - len(data))
        if not piece:
            raise _Died
        data += piece
    return bytes(data)
