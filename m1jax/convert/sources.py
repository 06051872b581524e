"""What is converted: official tensors in safetensors files or in a checkpoint, read with plain reads.

Not through memory maps: a file that another program cuts short while it is read must end in a message, not in SIGBUS.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from m1jax.checkpoint import Info, checksums, newest_within, read_info
from m1jax.config import ModelConfig
from m1jax.convert.pieces import Piece
from m1jax.convert.zarr import BYTES_CODEC, PARAMS, chunk_file
from m1jax.errors import UserError, shortened
from m1jax.weights.directory import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    holds_checkpoints,
    is_model,
    open_weights,
    read_config,
    run_of,
)
from m1jax.weights.names import tensors
from m1jax.weights.safetensors import read_json

BLOCK_BYTES = 4 * 2**20


class Source(Protocol):
    """A model whose official tensors are all there."""

    directory: Path
    companions: Path
    """where the tokenizer's files are, if anywhere"""
    config: ModelConfig
    dtypes: dict[str, np.dtype]

    def place(self, piece: Piece) -> tuple[Path, int] | None:
        """File and offset of a piece's bytes; None where they are not in one."""
        ...

    def read(self, piece: Piece) -> np.ndarray:
        """The values of a piece that has no place."""
        ...

    def check_contents(self, process: int, processes: int) -> None:
        """Compares this process's share of what is read with checksums, where there are any.

        Raises:
            UserError: the contents of a file have changed since it was written.
        """
        ...

    def signature(self) -> str:
        """Changes when a file does; UserError if one is gone."""
        ...


def open_source(path: Path) -> Source:
    """A directory of safetensors files; a checkpoint, or the newest of a directory of checkpoints or a run."""
    is_run = (path / CHECKPOINTS).is_dir()
    return Checkpoint(path) if not is_model(path) and (is_run or holds_checkpoints(path)) else Files(path)


def blocks(source: Source, piece: Piece) -> Iterator[np.ndarray]:
    """The values of a piece in order, some at a time, flat; each is good until the next is asked for.

    Raises:
        UserError: they cannot be read, or the file has become shorter.
    """
    place = source.place(piece)
    if place is None:
        yield source.read(piece).reshape(-1)
        return
    (file, start), dtype = place, source.dtypes[piece.tensor.name]
    left = piece.nbytes(dtype)
    buffer = memoryview(bytearray(min(left, BLOCK_BYTES)))
    with opened(file) as descriptor:
        while left:
            filled, count = 0, min(left, BLOCK_BYTES)
            while filled < count:
                with reading(file):
                    n = os.preadv(descriptor, [buffer[filled:count]], start + filled)
                if n == 0:
                    raise became_shorter(file)
                filled += n
            yield np.frombuffer(buffer[:count], dtype)
            start, left = start + count, left - count


@contextlib.contextmanager
def opened(file: Path) -> Iterator[int]:
    """A file of the source, open for reading."""
    with reading(file):
        descriptor = os.open(file, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that blames the source."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); was it moved or removed while it was converted?"
        ) from error


def became_shorter(file: Path) -> UserError:
    """The message for a file that ends before its header says."""
    return UserError(f"{file}: became shorter while it was read; start again when nobody writes to it")


class Files:
    """The official tensors of a directory of safetensors files."""

    def __init__(self, directory: Path) -> None:
        self.directory = self.companions = directory
        self.config: ModelConfig = read_config(directory)
        self._entries = open_weights(directory, self.config).entries
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}

    def place(self, piece: Piece) -> tuple[Path, int]:
        entry = self._entries[piece.tensor.name]
        return entry.file, entry.start + piece.first * entry.count // entry.shape[0]

    def read(self, piece: Piece) -> np.ndarray:
        raise AssertionError(f"{piece.tensor.name} has a place")

    def check_contents(self, process: int, processes: int) -> None:
        """There are no checksums in these files."""

    def signature(self) -> str:
        return _signature(sorted({entry.file for entry in self._entries.values()}))


class Checkpoint:
    """The official tensors in a checkpoint: the one at ``path``, or the newest whole one of a directory or a run.

    Raises:
        UserError: it is damaged, holds no parameters, or does not say which model it is.
    """

    def __init__(self, path: Path) -> None:
        self.directory = newest_within(path.absolute())
        self.companions = _companions(self.directory)
        self._info: Info = read_info(self.directory)
        if not self._info.params or self._info.config is None:
            raise UserError(f"{self.directory} holds no parameters of a model")
        values: dict[str, Any] = {**self._info.config, "layer_types": tuple(self._info.config["layer_types"])}
        self.config = ModelConfig(**values)
        merged = {t.path + t.index: t for t in tensors(self.config, merged_experts=True)}
        self._place = {t.name: (merged[t.path + t.index[:1]].name, t.index[1:]) for t in tensors(self.config)}
        self.dtypes = {}
        for tensor in tensors(self.config):
            name, _ = self._place[tensor.name]
            if name not in self._info.params:
                raise UserError(f"{self.directory}: missing {name}")
            self.dtypes[tensor.name] = np.dtype(_dtype(self._info.params[name][0]))
        self._stores: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._ocdbt = (self.directory / PARAMS / "manifest.ocdbt").exists()

    def check_contents(self, process: int, processes: int) -> None:
        files = self._files()[process::processes]
        with reading(self.directory):
            sums = checksums([self.directory / name for name in files])
        changed = [name for name, found in zip(files, sums) if found != self._info.files[name][1]]
        if changed:
            raise UserError(f"{self.directory}: the contents of {shortened(changed)} have changed since it was saved")

    def place(self, piece: Piece) -> tuple[Path, int] | None:
        # A checkpoint that came from a conversion has the bytes of a piece in one.
        name, expert = self._place[piece.tensor.name]
        rows = None if self._ocdbt else self._rows_per_chunk(name)
        if rows is None or piece.first // rows != (piece.stop - 1) // rows:
            return None
        ndim = len(self._info.params[name][1])
        file = self.directory / chunk_file(name, (*expert, piece.first // rows), ndim)
        row = piece.tensor.size // piece.tensor.shape[0] * self.dtypes[piece.tensor.name].itemsize
        return file, piece.first % rows * row

    @functools.cache  # noqa: B019 (lives as long as the conversion)
    def _rows_per_chunk(self, name: str) -> int | None:
        file = self.directory / PARAMS / name / "zarr.json"
        with reading(file):
            values = json.loads(file.read_text())
        shape, chunk = values["shape"], values["chunk_grid"]["configuration"]["chunk_shape"]
        experts = len(shape) - 2 if len(shape) > 2 else 0
        whole_rows = chunk[experts + 1 :] == shape[experts + 1 :] and chunk[:experts] == [1] * experts
        return chunk[experts] if whole_rows and values["codecs"] == BYTES_CODEC else None

    def read(self, piece: Piece) -> np.ndarray:
        name, expert = self._place[piece.tensor.name]
        try:
            return self._store(name)[(*expert, slice(piece.first, piece.stop))].read().result()
        except ValueError as error:
            raise UserError(f"{self.directory}: {name} cannot be read: {str(error).splitlines()[0][:300]}") from error

    def _store(self, name: str) -> Any:
        import tensorstore as ts

        with self._lock:
            if name not in self._stores:
                base = {"driver": "file", "path": f"{self.directory / PARAMS}/"}
                kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if self._ocdbt else base
                if not self._ocdbt:
                    kvstore["path"] += f"{name}/"
                self._stores[name] = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
            return self._stores[name]

    def signature(self) -> str:
        return _signature([self.directory / name for name in self._files()])

    def _files(self) -> list[str]:
        return sorted(name for name in self._info.files if name.startswith(f"{PARAMS}/"))


def _companions(checkpoint: Path) -> Path:
    """Where the tokenizer of a checkpoint's model is: beside it, or in its run's export, or where the run began."""
    places = [checkpoint]
    if (run := run_of(checkpoint)) is not None:
        places.append(run / EXPORT)
        with contextlib.suppress(UserError):
            settings = read_json(run / CONFIG)
            places += [Path(settings["model"])] if isinstance(settings.get("model"), str) else []
    return next((place for place in places if (place / "tokenizer.json").is_file()), checkpoint)


def _signature(files: list[Path]) -> str:
    found = []
    for file in files:
        with reading(file):
            status = file.stat()
        found.append((str(file), status.st_size, status.st_mtime_ns))
    return repr(found)


def _dtype(name: str) -> Any:
    import ml_dtypes

    return getattr(ml_dtypes, name, None) or name
