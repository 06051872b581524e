"""What a program may use, and what became of it."""

import dataclasses
from typing import Literal

from m1jax.errors import require_positive

Reason = Literal["ok", "error", "timeout", "memory", "output", "refused"]
"""ok: ended with status 0; error: with another one; timeout, memory, output: stopped at that limit; refused: not run,
because this system cannot isolate it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a program together with all processes that it starts.

    Raises:
        UserError: a limit is not above zero.
    """

    cpu_seconds: float = 10.0
    """processor time"""
    wall_seconds: float = 20.0
    memory: int = 1 << 30
    """bytes; no single process can reserve more, and the program is stopped when all together use more"""
    processes: int = 32
    """at one time, threads included"""
    files: int = 64 << 20
    """bytes of all files in the scratch folder (which lies in memory), and so of any one"""
    output: int = 1 << 20
    """bytes on stdout, and as many on stderr"""

    def __post_init__(self) -> None:
        require_positive(self, *(field.name for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a program."""

    status: int | None
    """exit status, or minus the number of the signal that ended it; None where it was stopped or not run"""
    stdout: str
    stderr: str
    """both up to the limit, bytes that are not UTF-8 replaced; for `refused`, what to install or allow"""
    reason: Reason
