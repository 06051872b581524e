"""What of a conversion is done, kept beside its files: killed, it goes on there; its processes see each other's."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from m1jax.disk import write_atomically, writing
from m1jax.errors import UserError

JOURNAL = ".journal"
PATIENCE = 60.0
"""Seconds after its own start in which a process takes another's failure for an earlier attempt's: started again, that
one removes it."""
LOOK_EVERY = 1.0
"""Seconds between looks at what the others say."""


class Progress(NamedTuple):
    """One process's journal: pieces copied, CRC-32 of those found equal to their source, and why it gave up."""

    copied: set[int]
    verified: dict[int, int]
    failure: str | None


def read(path: Path, identity: str) -> Progress:
    """A journal; empty where there is none, or one of another conversion.

    Lines are "c N" (piece N copied), "v N CRC" (and found equal to its source) and "f WHY"; a killed process may leave
    half of one. The first line names the conversion: its source, as it was, and its options.
    """
    progress = Progress(set(), {}, None)
    try:
        lines = path.read_text().split("\n")[:-1]
    except FileNotFoundError:
        return progress
    if not lines or lines[0] != identity:
        return progress
    for line in lines[1:]:
        kind, _, rest = line.partition(" ")
        if kind == "c":
            progress.copied.add(int(rest))
        elif kind == "v":
            number, checksum = rest.split()
            progress.verified[int(number)] = int(checksum)
        else:
            progress = progress._replace(failure=rest)
    return progress


class Journal:
    """The journal of this process, continued where there is one. Its methods may be called from any thread.

    Args:
        directory: where the conversion writes; exists.
        identity: one line; a journal of another conversion is not continued.
        process, count: which of how many processes this is.
    """

    def __init__(self, directory: Path, identity: str, process: int, count: int) -> None:
        self._directory, self._identity, self._process, self._count = directory, identity, process, count
        self._path = self._path_of(process)
        self._lock = threading.Lock()
        self.copied, self.verified, _ = read(self._path, identity)
        lines = [f"c {number}\n" for number in sorted(self.copied)]
        lines += [f"v {number} {checksum}\n" for number, checksum in sorted(self.verified.items())]
        write_atomically(self._path, "".join([identity, "\n", *lines]))
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 (lives as long as this object)
        # By the clock of the file system, which the processes share even where their own differ.
        self._began, self._started = self._path.stat().st_mtime, time.monotonic()
        self._looked = self._started

    def copy(self, number: int) -> None:
        """Piece `number` is copied."""
        self._note(f"c {number}\n")
        self.copied.add(number)

    def verify(self, number: int, checksum: int) -> None:
        """Piece `number` is equal to its source, with this CRC-32."""
        self._note(f"v {number} {checksum}\n")
        self.verified[number] = checksum

    def fail(self, why: str, *, useless: bool) -> None:
        """Tells the other processes that this one gives up; `useless`: and that nothing it did can be gone on with."""
        line = f"f {' '.join(why.split())}\n"
        with contextlib.suppress(OSError):  # on a full disk, which is why it gives up
            if useless:
                write_atomically(self._path, f"{self._identity}\n{line}")
            else:
                self._file.write(line)

    def check_others(self) -> None:
        """Raises OtherFailed where another process gave up; looks once in a while only."""
        now = time.monotonic()
        if now > self._looked + LOOK_EVERY:
            self._looked = now
            self._refuse_failures()

    def await_others(self, pieces: int) -> dict[int, int]:
        """The checksums of all pieces, once every process has verified its share.

        Raises:
            UserError: another process gave up.
        """
        said = False
        while True:
            self._refuse_failures()
            verified = dict(self.verified)
            for process in self._others():
                verified |= read(self._path_of(process), self._identity).verified
            if len(verified) == pieces:
                return verified
            if not said:
                missing = sorted({number % self._count for number in range(pieces) if number not in verified})
                print(f"waiting for process {', '.join(map(str, missing))}", file=sys.stderr)
                said = True
            time.sleep(0.5)

    def remove(self) -> None:
        """Removes the journals of all processes."""
        for file in self._directory.glob(f"{JOURNAL}-*"):
            file.unlink()

    def close(self) -> None:
        self._file.close()

    def _note(self, line: str) -> None:
        with self._lock, writing(self._path):
            self._file.write(line)

    def _others(self) -> list[int]:
        return [process for process in range(self._count) if process != self._process]

    def _path_of(self, process: int) -> Path:
        return self._directory / f"{JOURNAL}-{process}"

    def _refuse_failures(self) -> None:
        for process in self._others():
            path = self._path_of(process)
            why = _failure(path, self._identity)
            if why is not None and self._is_of_this_attempt(path):
                raise OtherFailed(f"process {process} of {self._count} gave up: {why}")

    def _is_of_this_attempt(self, journal: Path) -> bool:
        if time.monotonic() > self._started + PATIENCE:
            return True
        try:
            return journal.stat().st_mtime >= self._began
        except FileNotFoundError:
            return False


def _failure(journal: Path, identity: str) -> str | None:
    """Why its process gave up, from the last line: cheap, however long the journal is."""
    try:
        with open(journal, "rb") as file:
            if file.readline().decode() != f"{identity}\n":
                return None
            file.seek(max(file.tell(), file.seek(0, os.SEEK_END) - 10_000))
            last = file.read().decode(errors="replace").rstrip("\n").rpartition("\n")[2]
    except FileNotFoundError:
        return None
    return last[2:] if last.startswith("f ") else None


class OtherFailed(UserError):
    """Another process of the conversion gave up, and said why."""
