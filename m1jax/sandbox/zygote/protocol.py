"""Messages between the pool and a worker: a length (4 bytes), a JSON object, and the bytes whose lengths it names."""

import dataclasses
import errno
import json
import socket
import struct
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run; sizes in bytes, times in seconds."""

    command: list[str]
    """empty for a Python program given as its source"""
    environment: dict[str, str]
    cpu_seconds: float
    wall_seconds: float
    memory: int
    processes: int
    files: int
    output: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    reason: str
    status: int | None
    stdout: bytes
    stderr: bytes


def send(control: socket.socket, head: dict[str, Any], body: bytes = b"") -> None:
    text = json.dumps(head).encode()
    control.sendall(struct.pack("=I", len(text)) + text + body)


def answer(control: socket.socket, outcome: Outcome) -> None:
    sizes = {"stdout": len(outcome.stdout), "stderr": len(outcome.stderr)}
    send(control, {"reason": outcome.reason, "status": outcome.status, **sizes}, outcome.stdout + outcome.stderr)


def next_job(control: socket.socket) -> tuple[Job, bytes, bytes] | None:
    """A job, its Python source and its standard input; None when nobody asks any more."""
    with control.makefile("rb") as stream:  # one job at a time: there is nothing beyond it to be lost in the buffer
        size = stream.read(4)
        if len(size) < 4:
            return None
        head = json.loads(stream.read(struct.unpack("=I", size)[0]))
        sizes = head.pop("source"), head.pop("stdin")
        source, stdin = (stream.read(size) for size in sizes)
        return Job(**head), source, stdin


def describe(error: OSError) -> str:
    """What failed, in words and with the error's name."""
    return f"{error.filename}: {error.strerror} ({errno.errorcode.get(error.errno or 0)})"
