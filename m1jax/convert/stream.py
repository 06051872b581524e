"""Copies a model piece by piece, in any number of processes, and verifies what was written.

A piece is a range of rows of one official tensor, at most 128 MiB, whose bytes are contiguous in source and target.
Where the dtype stays, the kernel copies them from file to file and nothing passes through this process; otherwise a few
pieces at a time are in memory, whatever the model's size. Finished pieces are noted in a journal beside the files, so
that a killed conversion goes on where it was, and pieces can be shared out between hosts. At the end every piece is
read back and compared with its source by CRC-32; only then does the target get its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from m1jax.convert.journal import Journal, OtherFailed
from m1jax.convert.pieces import Piece
from m1jax.convert.sources import Source, became_shorter, blocks, opened
from m1jax.convert.targets import Target
from m1jax.disk import FULL, check_space, sync, writing
from m1jax.errors import UserError, shortened
from m1jax.weights.safetensors import cast, finite, write_all


class Damaged(UserError):
    """What was copied is of no use: the next attempt must start from the beginning."""


def convert(source: Source, target: Target, *, threads: int, process: int = 0, processes: int = 1) -> None:
    """Runs one conversion, or goes on with it.

    Args:
        source: what is converted.
        target: what is made of it.
        threads: pieces copied at once.
        process, processes: which of how many this is; all need the same arguments and file system. Process 0 waits
            for the others and completes the target.

    Raises:
        UserError: the target is taken, the disk is full, the source is damaged or changes, the result differs from it,
            or another process gave up. What is done stays beside the target and is used when the same is run again.
    """
    target.check_free()
    signature = source.signature()
    with writing(target.directory):
        target.directory.mkdir(parents=True, exist_ok=True)
        journal = Journal(target.directory, _identity(signature, target), process, processes)
    with contextlib.closing(journal):
        try:
            source.check_contents(process, processes)
            _copy_and_verify(source, target, signature, journal, range(len(target.pieces))[process::processes], threads)
            if process == 0:
                checksums = journal.await_others(len(target.pieces))
                with writing(target.directory):
                    target.complete(checksums)
                    journal.remove()
                target.put_in_place()
                print(f"{target.final}: {len(target.pieces):,} pieces verified", file=sys.stderr)
        except OtherFailed:
            raise
        except Exception as error:
            journal.fail(str(error), useless=isinstance(error, Damaged))
            raise


def _identity(signature: str, target: Target) -> str:
    """Of a conversion; what is done of another one is not continued."""
    pieces = [piece[1:] for piece in target.pieces]
    parts = (signature, sorted(target.sizes.items()), pieces, sorted(map(str, target.dtypes.items())))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _copy_and_verify(
    source: Source, target: Target, signature: str, journal: Journal, mine: range, threads: int
) -> None:
    files = sorted({target.pieces[n].file for n in mine})
    sizes = {n: target.pieces[n].nbytes(target.dtypes[target.pieces[n].tensor.name]) for n in mine}
    needed = sum(target.sizes.values())
    problems: list[str] = []

    def copy(number: int) -> None:
        piece = target.pieces[number]
        with writing(target.directory / piece.file, needed), _opened(target, piece.file) as descriptor:
            copy_piece(source, piece, target.dtypes[piece.tensor.name], descriptor)
        journal.copy(number)

    def verify(number: int) -> None:
        piece = target.pieces[number]
        with writing(target.directory / piece.file), _opened(target, piece.file) as descriptor:
            try:
                checksum = verify_piece(source, piece, target.dtypes[piece.tensor.name], descriptor)
            except Damaged as error:
                if source.signature() != signature:
                    raise UserError(f"{source.directory}: changed while it was converted; start again") from error
                problems.append(str(error))
                return
        journal.verify(number, checksum)

    with _progress() as progress:
        if not journal.copied and len(mine) == len(target.pieces):
            check_space(target.directory, needed)
        for text, work, done in (("copying", copy, journal.copied), ("verifying", verify, set(journal.verified))):
            began = time.monotonic()
            todo = [n for n in mine if n not in done]
            task = progress.add_task(
                text, total=sum(sizes.values()), completed=sum(sizes[n] for n in mine if n in done)
            )
            if work is copy:
                with writing(target.directory, needed):
                    _prepare(target, files)
            for number in _in_parallel(work, todo, threads):
                progress.advance(task, sizes[number])
                journal.check_others()
                if problems:
                    break
            if problems:
                raise Damaged(f"{source.directory}: {shortened(problems)}; the conversion was not completed")
            size, seconds = sum(sizes[n] for n in todo), time.monotonic() - began
            progress.console.print(f"{text}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)")
        for file in files:
            with writing(target.directory / file, needed):
                sync(target.directory / file)


def copy_piece(source: Source, piece: Piece, dtype: np.dtype, descriptor: int) -> None:
    """Writes a piece to its place in an open file of the target."""
    place = source.place(piece) if source.dtypes[piece.tensor.name] == dtype else None
    if place is not None and _copied_by_the_kernel(*place, piece.nbytes(dtype), piece.start, descriptor):
        return
    start = piece.start
    for values in blocks(source, piece):
        values = cast(values, dtype)
        write_all(descriptor, values, start)
        start += values.nbytes


def _copied_by_the_kernel(file: Path, offset: int, count: int, start: int, descriptor: int) -> bool:
    """Copies a range of bytes from file to file; False where the kernel or a file system cannot."""
    copied = 0
    with opened(file) as reader:
        while copied < count:
            try:
                n = os.copy_file_range(reader, descriptor, count - copied, offset + copied, start + copied)
            except OSError as error:
                if error.errno in FULL:
                    raise
                return False  # through memory it will be plain whether reading or writing went wrong
            if n == 0:
                raise became_shorter(file)
            copied += n
    return True


def verify_piece(source: Source, piece: Piece, dtype: np.dtype, descriptor: int) -> int:
    """The CRC-32 of a piece in an open file of the target.

    Raises:
        Damaged: it is not what the source holds, or that is not finite.
    """
    expected = 0
    for values in blocks(source, piece):
        if not finite(values):
            raise Damaged(f"NaN or infinity in {piece.tensor.name}")
        stored = cast(values, dtype)
        if stored.dtype != values.dtype and not finite(stored):
            raise Damaged(f"values in {piece.tensor.name} are too large for {dtype}")
        expected = zlib.crc32(np.ascontiguousarray(stored).view(np.uint8).data, expected)
    if _checksum(descriptor, piece.start, piece.nbytes(dtype)) != expected:
        raise Damaged(f"{piece.tensor.name} differs in {piece.file}")
    return expected


def _checksum(descriptor: int, start: int, count: int) -> int:
    checksum, block = 0, bytearray(min(count, 1 << 22))
    while count:
        n = os.preadv(descriptor, [memoryview(block)[: min(count, len(block))]], start)
        if n == 0:
            return -1
        checksum = zlib.crc32(memoryview(block)[:n], checksum)
        start, count = start + n, count - n
    return checksum


@contextlib.contextmanager
def _opened(target: Target, file: str) -> Iterator[int]:
    descriptor = os.open(target.directory / file, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _prepare(target: Target, files: Iterable[str]) -> None:
    """Makes files as long as they will be, with what stands in front of the tensors; keeps what is in them."""
    for file in files:
        path = target.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(descriptor).st_size != target.sizes[file]:
                os.ftruncate(descriptor, target.sizes[file])
            os.pwrite(descriptor, target.heads[file], 0)
        finally:
            os.close(descriptor)


def _in_parallel(work: Callable[[int], None], numbers: Iterable[int], threads: int) -> Iterator[int]:
    """Numbers as their work is done; no more than ``threads`` are begun. The first error stops it."""
    pending: dict[Future[None], int] = {}
    with ThreadPoolExecutor(threads) as pool:
        for number in numbers:
            pending[pool.submit(work, number)] = number
            if len(pending) >= threads:
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)


def _finished(pending: dict[Future[None], int]) -> Iterator[int]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        number = pending.pop(future)
        future.result()
        yield number


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, soft_wrap=True),
    )
