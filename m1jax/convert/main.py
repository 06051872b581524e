"""``m1jax convert SRC DST``: official files <-> Transformers' <-> our checkpoints, streamed piece by piece.

A piece is a range of rows of one official tensor, at most 128 MiB, whose bytes are contiguous in source and target.
Where the dtype stays, the kernel copies them from file to file and nothing passes through this process; otherwise a few
pieces at a time are in memory, whatever the model's size. Finished pieces are noted in a journal beside the files, so
that a killed conversion goes on where it was, and pieces can be shared out between hosts. At the end every piece is
read back and compared with its source by CRC-32; only then does the target get its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from m1jax.config import ModelConfig
from m1jax.convert import orbax
from m1jax.convert.files import (
    INDEX,
    NAMES,
    SHARD_BYTES,
    Plan,
    cast,
    check_space,
    finite,
    full_disk,
    shortened,
    write_all,
)
from m1jax.convert.names import Tensor, tensors, transformers_merged
from m1jax.convert.pretrained import (
    CONFIG,
    check_replaceable,
    copy_companions,
    open_weights,
    put_in_place,
    read_config,
)
from m1jax.errors import UserError

PIECE_BYTES = 128 * 2**20
JOURNAL = ".journal"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Converts a model between the authors' files, Transformers' and our checkpoints.

    Interrupted conversions go on where they stopped when the same command is run again.
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A directory of safetensors files, a directory of checkpoints, or one checkpoint in it."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The directory to make."""
    to: Literal["official", "transformers", "orbax"] | None = None
    """What to make. Default: official files from a checkpoint, a checkpoint from anything else."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the result; routers stay float32. Default: as in the source."""
    experts: Literal["split", "merged"] = "split"
    """Transformers' files only: one tensor per expert, as everybody reads them, or w1 and w3 of all experts of a layer
    in one as Transformers holds them in memory. Checkpoints always keep the experts of a layer together."""
    shard_gb: float = SHARD_BYTES / 1e9
    """Size at which a new safetensors file begins, in GB."""
    dry_run: bool = False
    """Print the table of tensors and where they would go, and write nothing."""
    threads: int = 2 * (os.cpu_count() or 1)
    """Pieces copied at once."""
    process_index: int = 0
    """Which of `process-count` processes this is; all need the same arguments and file system."""
    process_count: int = 1
    """How many processes share the work."""


class Piece(NamedTuple):
    """Rows ``first:stop`` of a tensor (elements, where it has one dimension) and their place in the target."""

    tensor: Tensor
    first: int
    stop: int
    file: str
    start: int


class Target(NamedTuple):
    """What is to be written: every piece's place, the bytes in front of them, and how the result is completed."""

    directory: Path
    dtypes: dict[str, np.dtype]
    pieces: list[Piece]
    sizes: dict[str, int]
    heads: dict[str, bytes]
    complete: Callable[[Path, dict[int, int]], None]


def main(config: ConvertConfig) -> None:
    """Runs one conversion.

    Raises:
        UserError: source or target are not what they should be, the disk is full, or the result differs from the
            source. What is done stays beside the target and is used when the command is run again.
    """
    if not 0 <= config.process_index < config.process_count:
        raise UserError(f"process-index {config.process_index} must lie below process-count {config.process_count}")
    source = open_source(config.src)
    kind = config.to or ("official" if isinstance(source, orbax.Checkpoint) else "orbax")
    if config.experts == "merged" and kind != "transformers":
        raise UserError("experts=merged is a form of Transformers' files: it needs --to transformers")
    if not 0 < config.shard_gb < 1e9 or config.threads < 1:
        raise UserError("shard-gb and threads must be positive numbers")
    target = _orbax_target(source, config) if kind == "orbax" else _files_target(source, config, kind)
    if config.dry_run:
        _print_table(source, target)
        return
    _refuse_source_as_target(config)
    _convert(source, target, config)


def open_source(path: Path) -> Source:
    """A directory of safetensors files, of checkpoints, or a checkpoint."""
    if orbax.is_checkpoint(path):
        return orbax.Checkpoint(path)
    return Files(path)


class Files:
    """The official tensors of a directory of safetensors files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: ModelConfig = read_config(directory)
        self._weights = open_weights(directory, self.config)
        self.dtypes = {name: entry.dtype for name, entry in self._weights.entries.items()}

    def place(self, piece: Piece) -> tuple[Path, int] | None:
        """File and offset of a piece's bytes."""
        entry = self._weights.entries[piece.tensor.name]
        return entry.file, entry.start + piece.first * entry.count // entry.shape[0]

    def read(self, piece: Piece) -> np.ndarray:
        """The values of a piece."""
        return self._weights.array(piece.tensor.name)[piece.first : piece.stop]

    def release(self, piece: Piece) -> None:
        """The tensor of the piece will not be read again soon."""
        if piece.stop == piece.tensor.shape[0]:
            self._weights.release(piece.tensor.name)

    def signature(self) -> str:
        """Changes when a file does."""
        files = sorted({entry.file for entry in self._weights.entries.values()})
        return repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


Source = Files | orbax.Checkpoint


# ----------------------------------------------------------------------------------------------------------- targets


def _dtypes(source: Source, config: ConvertConfig) -> dict[str, np.dtype]:
    by_name = {name: dtype for dtype, name in NAMES.items()}
    given = by_name[DTYPES[config.dtype]] if config.dtype else None
    return {
        t.name: np.dtype(np.float32) if t.router else (given or source.dtypes[t.name]) for t in tensors(source.config)
    }


def _rows(tensor: Tensor, dtype: np.dtype) -> int:
    """Rows in a piece: the largest divisor of all rows that makes no more than PIECE_BYTES."""
    rows = tensor.shape[0]
    limit = max(1, PIECE_BYTES // (tensor.size // rows * dtype.itemsize))
    return next(n for n in range(min(rows, limit), 0, -1) if rows % n == 0)


def _cut(tensor: Tensor, dtype: np.dtype) -> Iterator[tuple[int, int]]:
    rows = _rows(tensor, dtype)
    for first in range(0, tensor.shape[0], rows):
        yield first, first + rows


def _files_target(source: Source, config: ConvertConfig, layout: Literal["official", "transformers"]) -> Target:
    values = source.config.to_hf(layout)
    dtypes = _dtypes(source, config)
    table = tensors(source.config)
    shard_bytes = int(config.shard_gb * 1e9)
    if config.experts == "merged":
        merged = transformers_merged(source.config)
        plan = Plan(((m.name, m.shape, dtypes[m.parts[0][0]]) for m in merged), shard_bytes=shard_bytes)
        plan.place_parts(merged)
    else:
        plan = Plan(((t.name, t.shape, dtypes[t.name]) for t in table), shard_bytes=shard_bytes)
    pieces = []
    for tensor in table:
        entry = plan.entries[tensor.name]
        for first, stop in _cut(tensor, entry.dtype):
            start = entry.start + first * entry.count // tensor.shape[0]
            pieces.append(Piece(tensor, first, stop, entry.file.name, start))
    values["torch_dtype" if layout == "official" else "dtype"] = str(dtypes["model.embed_tokens.weight"])

    def complete(directory: Path, _: dict[int, int]) -> None:
        if (index := plan.index()) is not None:
            (directory / INDEX).write_bytes(index)
        (directory / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        copy_companions(source.directory, directory)

    final = config.dst.resolve()
    partial = final.parent / f".{final.name}.converting"
    return Target(partial, dtypes, pieces, plan.sizes, plan.headers, complete)


def _orbax_target(source: Source, config: ConvertConfig) -> Target:
    dtypes = _dtypes(source, config)
    merged = {t.path + t.index: t for t in tensors(source.config, merged_experts=True)}
    arrays: dict[str, orbax.ArrayFile] = {}
    pieces, sizes, heads = [], {}, {}
    for tensor in tensors(source.config):
        whole = merged[tensor.path + tensor.index[:1]]
        dtype, rows = dtypes[tensor.name], _rows(tensor, dtypes[tensor.name])
        chunk = (*(1,) * (len(whole.shape) - len(tensor.shape)), rows, *tensor.shape[1:])
        arrays[whole.name] = orbax.ArrayFile(whole.shape, dtype, chunk)
        for first in range(0, tensor.shape[0], rows):
            file = orbax.chunk_file(whole.name, (*tensor.index[1:], first // rows), len(whole.shape))
            pieces.append(Piece(tensor, first, first + rows, file, 0))
            sizes[file] = tensor.size // tensor.shape[0] * rows * dtype.itemsize
            heads[file] = b""

    def complete(directory: Path, checksums: dict[int, int]) -> None:
        sums = {pieces[number].file: checksum for number, checksum in checksums.items()}
        orbax.complete(directory, source.config, arrays, sums)
        copy_companions(source.directory, directory)

    partial = config.dst.resolve() / f"{orbax.STEP}.converting"
    return Target(partial, dtypes, pieces, sizes, heads, complete)


def _print_table(source: Source, target: Target) -> None:
    first: dict[str, tuple[Piece, int]] = {}
    for piece in target.pieces:
        found, count = first.get(piece.tensor.name, (piece, 0))
        first[piece.tensor.name] = (found, count + 1)
    total = 0
    for tensor in tensors(source.config):
        piece, count = first[tensor.name]
        before, after = source.dtypes[tensor.name], target.dtypes[tensor.name]
        cast = str(before) if before == after else f"{before} -> {after}"
        ours = ".".join(map(str, tensor.path)) + (f"[{', '.join(map(str, tensor.index))}]" if tensor.index else "")
        where = f"{piece.file} @ {piece.start:,}" + (f" and {count - 1} more" if piece.start == 0 and count > 1 else "")
        print(f"{tensor.name}  {list(tensor.shape)}  {cast}  {ours}  {where}")
        total += tensor.size * after.itemsize
    parameters = sum(t.size for t in tensors(source.config))
    print(
        f"{len(first):,} tensors, {parameters:,} parameters, {total:,} bytes in {len(target.sizes):,} files; "
        f"nothing was written"
    )


# -------------------------------------------------------------------------------------------------------- conversion


def _refuse_source_as_target(config: ConvertConfig) -> None:
    source, target = config.src.resolve(), config.dst.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise UserError(f"source {config.src} and target {config.dst} must be different directories")


class Journal:
    """What is done: lines "c N" (piece N copied) and "v N CRC" (and found equal to its source), one file per process.

    The first line names the conversion; a journal of another one (source changed, other options) is not continued.
    """

    def __init__(self, directory: Path, identity: str, process: int) -> None:
        self.directory, self.identity = directory, identity
        self.copied: set[int] = set()
        self.verified: dict[int, int] = {}
        self._path = directory / f"{JOURNAL}-{process}"
        self._lock = threading.Lock()
        fresh = True
        if self._path.exists():
            text = self._path.read_text()
            lines = text[: text.rfind("\n") + 1].splitlines()
            fresh = not lines or lines[0] != identity
            for kind, number, *rest in (line.split() for line in lines[1:] if not fresh):
                if kind == "c":
                    self.copied.add(int(number))
                else:
                    self.verified[int(number)] = int(rest[0])
            if not fresh:
                os.truncate(self._path, text.rfind("\n") + 1)
        if fresh:
            self._path.write_text(identity + "\n")
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 (lives as long as this object)

    def copy(self, number: int) -> None:
        with self._lock:
            self._file.write(f"c {number}\n")
            self.copied.add(number)

    def verify(self, number: int, checksum: int) -> None:
        with self._lock:
            self._file.write(f"v {number} {checksum}\n")
            self.verified[number] = checksum

    def close(self) -> None:
        self._file.close()


def _convert(source: Source, target: Target, config: ConvertConfig) -> None:
    final = config.dst.resolve()
    orbax_target = target.directory.parent == final
    if orbax_target:
        orbax.check_new(final)
    else:
        check_replaceable(final)
    if isinstance(source, orbax.Checkpoint):
        source.check_contents(config.process_index, config.process_count)
    identity = hashlib.sha256(
        repr(
            (
                source.signature(),
                sorted(target.sizes.items()),
                [p[1:] for p in target.pieces],
                sorted(map(str, target.dtypes.items())),
            )
        ).encode()
    ).hexdigest()
    try:
        target.directory.mkdir(parents=True, exist_ok=True)
        journal = Journal(target.directory, identity, config.process_index)
    except OSError as error:
        raise full_disk(error, target.directory, 0) from error
    mine = range(len(target.pieces))[config.process_index :: config.process_count]
    files = sorted({target.pieces[n].file for n in mine})
    with contextlib.closing(journal), _progress() as progress:
        if not journal.copied and config.process_count == 1:
            check_space(target.directory, sum(target.sizes.values()))
        sizes = {n: _piece_bytes(target, target.pieces[n]) for n in mine}

        def copy(number: int) -> None:
            piece = target.pieces[number]
            with _opened(target, piece.file) as descriptor:
                _copy(source, piece, target.dtypes[piece.tensor.name], descriptor)
            journal.copy(number)

        def verify(number: int) -> None:
            piece = target.pieces[number]
            dtype = target.dtypes[piece.tensor.name]
            values = source.read(piece)
            bad = not finite(values)
            target_values = cast(values, dtype)
            expected = zlib.crc32(np.ascontiguousarray(target_values).reshape(-1).view(np.uint8).data)
            source.release(piece)
            if bad:
                problems.append(f"NaN or infinity in {piece.tensor.name}")
                return
            if values.dtype != dtype and not finite(target_values):
                problems.append(f"values in {piece.tensor.name} are too large for {dtype}")
                return
            with _opened(target, piece.file) as descriptor:
                written = _checksum(descriptor, piece.start, sizes[number])
            if written == expected:
                journal.verify(number, expected)
            else:
                problems.append(f"{piece.tensor.name} differs in {piece.file}")

        problems: list[str] = []
        for text, work, done in (("copying", copy, journal.copied), ("verifying", verify, set(journal.verified))):
            began = time.monotonic()
            todo = [n for n in mine if n not in done]
            task = progress.add_task(
                text, total=sum(sizes.values()), completed=sum(sizes[n] for n in mine if n in done)
            )
            try:
                if work is copy:
                    _prepare(target, files)
                for number in _in_parallel(work, todo, config.threads):
                    progress.advance(task, sizes[number])
                    if problems:
                        break
            except OSError as error:
                raise full_disk(error, target.directory, sum(target.sizes.values())) from error
            if problems:
                # Of no use for going on: with the journal gone the next run starts from the beginning.
                (target.directory / f"{JOURNAL}-{config.process_index}").unlink()
                raise UserError(f"{config.src}: {shortened(problems)}; the conversion was not completed")
            size, seconds = sum(sizes[n] for n in todo), time.monotonic() - began
            progress.console.print(f"{text}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)")
        orbax.sync([target.directory / file for file in files])
    if config.process_index == 0:
        checksums = _await_others(target, identity, config)
        try:
            target.complete(target.directory, checksums)
            for file in target.directory.glob(f"{JOURNAL}-*"):
                file.unlink()
        except OSError as error:
            raise full_disk(error, target.directory, 0) from error
        if orbax_target:
            target.directory.rename(final / str(orbax.STEP))
        else:
            put_in_place(target.directory, final)
        print(f"{final}: {len(target.pieces):,} pieces verified", file=sys.stderr)


def _copy(source: Source, piece: Piece, dtype: np.dtype, descriptor: int) -> None:
    place = source.place(piece) if source.dtypes[piece.tensor.name] == dtype else None
    if place is None:
        write_all(descriptor, cast(source.read(piece), dtype), piece.start)
        source.release(piece)
        return
    file, offset = place
    count = piece.tensor.size // piece.tensor.shape[0] * (piece.stop - piece.first) * dtype.itemsize
    with open(file, "rb", buffering=0) as reader:
        copied = 0
        while copied < count:
            try:
                n = os.copy_file_range(
                    reader.fileno(), descriptor, count - copied, offset + copied, piece.start + copied
                )
            except OSError as error:
                if error.errno in _CANNOT:  # the kernel or file system cannot; then through memory
                    write_all(descriptor, source.read(piece), piece.start)
                    source.release(piece)
                    return
                raise
            if n == 0:
                raise UserError(f"{file}: became shorter while it was read")
            copied += n


_CANNOT = {18, 22, 38, 95}  # EXDEV, EINVAL, ENOSYS, EOPNOTSUPP


def _piece_bytes(target: Target, piece: Piece) -> int:
    row = piece.tensor.size // piece.tensor.shape[0]
    return row * (piece.stop - piece.first) * target.dtypes[piece.tensor.name].itemsize


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


def _await_others(target: Target, identity: str, config: ConvertConfig) -> dict[int, int]:
    """The checksums of all pieces, once every process has verified its share."""
    sums: dict[int, int] = {}
    waiting = False
    while True:
        for process in range(config.process_count):
            path = target.directory / f"{JOURNAL}-{process}"
            lines = path.read_text().splitlines() if path.exists() else []
            if lines and lines[0] == identity:
                for line in lines[1:]:
                    kind, number, *rest = line.split()
                    if kind == "v" and rest:
                        sums[int(number)] = int(rest[0])
        if len(sums) == len(target.pieces):
            return sums
        if not waiting:
            print(f"waiting for the other {config.process_count - 1} processes", file=sys.stderr)
            waiting = True
        time.sleep(0.5)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, soft_wrap=True),
    )
