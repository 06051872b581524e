"""Runs one program after the other, watches it, and ends it with everything it has started.

Of a program's doings, the supervisor only touches its output, up to a limit, and numbers in /proc.
"""

import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import socket
import struct
import time

import init
import protocol
from protocol import Job, Outcome

TICK = 0.01
"""seconds between two looks at a program's memory and processor time"""
_CHUNK = 1 << 16
_DYING_WORDS = (b"MemoryError", b"std::bad_alloc", b"Cannot allocate memory")
_PAGE = resource.getpagesize()
_CLOCK = os.sysconf("SC_CLK_TCK")


class _Gone(Exception):
    """Whoever asked for the program is no longer there."""


def serve(control: socket.socket, zygote: socket.socket, ours: int) -> None:
    """Answers one job after the other; returns when nobody asks any more.

    Args:
        control: where jobs come from; when the connection is cut, so is the program.
        zygote: forks when asked.
        ours: processes of the worker that count as the program's user.
    """
    protocol.send(control, {"ready": True})
    with contextlib.suppress(_Gone):
        while (job := protocol.next_job(control)) is not None:
            protocol.answer(control, _run(*job, control, zygote, ours))


def _run(job: Job, source: bytes, stdin: bytes, control: socket.socket, zygote: socket.socket, ours: int) -> Outcome:
    (job_theirs, job_ours), (stdin_theirs, stdin_ours), *outputs = (os.pipe() for _ in range(5))
    theirs = [job_theirs, stdin_theirs, *(writer for _, writer in outputs)]
    socket.send_fds(zygote, [b"x"], theirs)
    for descriptor in theirs:
        os.close(descriptor)
    with contextlib.suppress(BrokenPipeError), os.fdopen(job_ours, "wb") as file:
        file.write(json.dumps({**dataclasses.asdict(job), "ours": ours}).encode() + b"\n" + source)
    first = zygote.recv(32)
    if not first:
        raise _Gone
    watch = _Watch(job, stdin, int(first), control, stdin_ours, *(reader for reader, _ in outputs))
    try:
        watch.until_the_end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(first), signal.SIGKILL)
        zygote.recv(32)  # comes when nothing in the program's namespaces is left
        watch.drain()
        watch.close()
    return watch.outcome()


class _Watch:
    """The supervisor's side of a running program."""

    def __init__(
        self,
        job: Job,
        text: bytes,
        first: int,
        control: socket.socket,
        stdin: int,
        stdout: int,
        stderr: int,
        report: int,
    ) -> None:
        self._job, self._first, self._control, self._report = job, first, control, report
        self._stdin = stdin
        self._unsent = memoryview(text)
        self._order = (stdout, stderr)
        self._kept = {stdout: bytearray(), stderr: bytearray()}
        self._open = {stdin, stdout, stderr}
        self._message = b""
        self._stopped_for: str | None = None
        self._deadline = time.monotonic() + job.wall_seconds
        for descriptor in (stdin, stdout, stderr, report):
            os.set_blocking(descriptor, False)
        self._poll = select.poll()
        for descriptor in (stdout, stderr, report, control.fileno()):
            self._poll.register(descriptor, select.POLLIN)
        self._poll.register(stdin, select.POLLOUT)

    def until_the_end(self) -> None:
        """Returns when the program has ended or must end."""
        look = time.monotonic() + TICK
        while self._stopped_for is None:
            for descriptor, _ in self._poll.poll(max(0.0, look - time.monotonic()) * 1000):
                if descriptor == self._report:
                    if not self._read_report():
                        return
                elif descriptor == self._control.fileno():
                    raise _Gone
                elif descriptor == self._stdin:
                    self._send()
                elif descriptor in self._open:
                    self._receive(descriptor)
            now = time.monotonic()
            if now > self._deadline:
                self._stop("timeout")
            if now >= look:
                self._look()
                look = time.monotonic() + TICK

    def drain(self) -> None:
        """What was still in the pipes when everything had ended."""
        for descriptor in self._order:
            while descriptor in self._open and self._receive(descriptor):
                pass

    def close(self) -> None:
        for descriptor in (*self._open, self._report):
            os.close(descriptor)

    def outcome(self) -> Outcome:
        stdout, stderr = (bytes(self._kept[descriptor]) for descriptor in self._order)
        kind, body = self._message[:1], self._message[1:]
        if kind == init.REFUSED:
            return Outcome("refused", None, b"", body)
        if kind == init.NOT_FOUND:
            return Outcome("error", 127, stdout, body.partition(b"\0")[0])
        if self._stopped_for is not None:
            return Outcome(self._stopped_for, None, stdout, stderr)
        if kind != init.STARTED:  # nobody else kills a program's init than the kernel when it is short of memory
            return Outcome("memory", None, stdout, stderr)
        status = os.waitstatus_to_exitcode(struct.unpack("=i", body)[0])
        if status == 0:
            reason = "ok"
        elif status == -signal.SIGXCPU:
            reason = "timeout"
        elif any(words in stderr[-400:] for words in _DYING_WORDS):
            reason = "memory"
        else:
            reason = "error"
        return Outcome(reason, status, stdout, stderr)

    def _stop(self, reason: str) -> None:
        self._stopped_for = self._stopped_for or reason

    def _read_report(self) -> bool:
        data = os.read(self._report, _CHUNK)
        self._message += data
        return bool(data)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._stdin, self._unsent[:_CHUNK]) :]
        except BrokenPipeError:
            self._unsent = memoryview(b"")
        if not self._unsent:
            self._end(self._stdin)

    def _receive(self, descriptor: int) -> bool:
        """Reads once; whether there may be more."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        kept = self._kept[descriptor]
        room = self._job.output - len(kept)
        kept += data[:room]
        if len(data) > room:
            self._stop("output")
            return False
        if not data:
            self._end(descriptor)
            return False
        return True

    def _end(self, descriptor: int) -> None:
        self._open.discard(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)

    def _look(self) -> None:
        memory, seconds = _use(self._first)
        if seconds > self._job.cpu_seconds:
            self._stop("timeout")
        # Pages that processes share count in each of them; where that decides, count more exactly.
        if memory > self._job.memory and _proportional(self._first) > self._job.memory:
            self._stop("memory")


def _processes() -> list[str]:
    ours = ("1", str(os.getpid()))
    return [name for name in os.listdir("/proc") if name.isdigit() and name not in ours]


def _use(first: int) -> tuple[int, float]:
    """Resident bytes and processor seconds of everything that runs below this process, but the memory of `first`."""
    pages = ticks = 0
    for name in _processes():
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += sum(map(int, fields[11:15]))  # of itself, and of the children that it has waited for
        if name != str(first):
            pages += int(fields[21])
    return pages * _PAGE, ticks / _CLOCK


def _proportional(first: int) -> int:
    """Bytes, each page divided among the processes that share it."""
    total = 0
    for name in _processes():
        if name == str(first):
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{name}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total
