"""Files that appear whole or not at all and outlast a power cut; directories that belong to one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import shutil
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path

from m1jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)
LOCK = ".lock"


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file appears whole or not at all, and stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's contents durable, or which names a directory holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, directory: Path) -> None:
    """Renames a complete directory to its name; what has that name now goes away afterwards."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    with writing(directory):
        if directory.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            directory.rename(replaced)
        partial.rename(directory)
        sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- what can go wrong


@contextlib.contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns an OSError into a UserError that names the file (see `explained`)."""
    try:
        yield
    except OSError as error:
        raise explained(error, path, needed) from error


def explained(error: OSError, path: Path, needed: int | None = None) -> UserError:
    """What to tell about an error while writing.

    Args:
        error: what happened. The file it names is told; one from a file that was open names none.
        path: what is told then.
        needed: bytes that were to be written, for the message.
    """
    file = error.filename or path
    if error.errno in FULL:
        size = "" if needed is None else f" ({needed:,} bytes were to be written)"
        return UserError(f"{file}: the disk is full{size}; free some and start again")
    if error.errno == errno.EROFS:
        return UserError(f"{file}: this file system is read-only; choose another place")
    if error.errno in NOT_PERMITTED:
        return UserError(f"{file}: not permitted ({error.strerror}); choose another place, or change its permissions")
    return UserError(f"{file}: cannot be written ({error.strerror})")


def check_space(directory: Path, needed: int) -> None:
    """Raises UserError if ``needed`` bytes do not fit on the disk of ``directory``."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"{directory}: the disk is full: {needed:,} bytes are to be written, {free:,} are free")


class Place:
    """A directory that must stay where it is while this process writes to it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._identity = self._look()

    def check(self) -> None:
        """Raises UserError where another directory, or none, has its name now."""
        if self._look() != self._identity:
            raise UserError(
                f"{self._directory} was moved or removed while it was written to; move it back and start again"
            )

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._directory)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino


class Lock:
    """Keeps other processes, on this and other hosts, out of a directory for as long as this object lives.

    The operating system lets go of it when the process ends, however it ends. It does not keep this process itself
    out, and a second lock of one directory in it ends the first; threads must not share directories anyway.

    Raises:
        UserError: another process holds it (named).
        OSError: the directory is not there, or cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # what POSIX says of a lock that another one holds
                logging.getLogger("m1jax").warning(
                    "%s: this file system has no locks (%s): see to it that nobody else works there",
                    directory,
                    error.strerror,
                )
                return
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            raise UserError(f"{directory} is in use: {holder}; wait for it, stop it, or choose another name") from error
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode(), 0)
