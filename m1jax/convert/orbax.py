"""Our checkpoints as source and target of a conversion: read with TensorStore, written file by file.

Orbax can only save a tree that is in memory as a whole. What it loads, however, is a directory per array of plain
Zarr 3: ``zarr.json`` and one file per chunk, which without compression holds nothing but the chunk's elements. Chunks
of contiguous rows make such a file a byte range of the official tensor.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m1jax.checkpoint import MANIFEST, TREE, Info, checksums, newest_whole, read_info, write_manifest
from m1jax.config import ModelConfig
from m1jax.convert.files import shortened
from m1jax.convert.names import tensors
from m1jax.errors import UserError

if TYPE_CHECKING:
    from m1jax.convert.main import Piece

STEP = 0  # of a checkpoint that no training made
PARAMS = f"{TREE}/params"
BYTES_CODEC = [{"name": "bytes", "configuration": {"endian": "little"}}]


class ArrayFile(NamedTuple):
    """One array to be written: its shape, dtype and the shape of a chunk, which divides it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


def is_checkpoint(path: Path) -> bool:
    """Whether this is one of our checkpoints or a directory of them."""
    return (path / MANIFEST).is_file() or any(path.glob(f"[0-9]*/{MANIFEST}"))


class Checkpoint:
    """The official tensors in a checkpoint: the one at ``path``, or the newest whole one in that directory.

    Raises:
        UserError: it is damaged, holds no parameters, or does not say which model it is.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path.absolute() if (path / MANIFEST).is_file() else newest_whole(path.absolute())
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
        """Compares this process's share of the parameters' files with the checksums made when they were written.

        Raises:
            UserError: the contents of a file have changed.
        """
        files = sorted(name for name in self._info.files if name.startswith(f"{PARAMS}/"))[process::processes]
        sums = checksums([self.directory / name for name in files])
        changed = [name for name, found in zip(files, sums) if found != self._info.files[name][1]]
        if changed:
            raise UserError(f"{self.directory}: the contents of {shortened(changed)} have changed since it was saved")

    def place(self, piece: Piece) -> tuple[Path, int] | None:
        """File and offset of a piece's bytes, where the checkpoint came from a conversion and so has them in one."""
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
        values = json.loads((self.directory / PARAMS / name / "zarr.json").read_text())
        shape, chunk = values["shape"], values["chunk_grid"]["configuration"]["chunk_shape"]
        experts = len(shape) - 2 if len(shape) > 2 else 0
        whole_rows = chunk[experts + 1 :] == shape[experts + 1 :] and chunk[:experts] == [1] * experts
        return chunk[experts] if whole_rows and values["codecs"] == BYTES_CODEC else None

    def read(self, piece: Piece) -> np.ndarray:
        """The values of a piece."""
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

    def release(self, piece: Piece) -> None:
        """Nothing is kept after a read."""

    def signature(self) -> str:
        """Changes when the checkpoint does."""
        return repr((str(self.directory), self._info.saved, sorted(self._info.files.items())))


def _dtype(name: str) -> Any:
    import ml_dtypes

    return getattr(ml_dtypes, name, None) or name


def chunk_file(name: str, place: tuple[int, ...], ndim: int) -> str:
    """The file of a chunk, relative to the checkpoint; ``place`` is its number along the first axes."""
    return f"{PARAMS}/{name}/c/" + "/".join(map(str, (*place, *(0,) * (ndim - len(place)))))


def check_new(directory: Path) -> None:
    """Raises UserError where a checkpoint of step 0 cannot be made."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give the name of a new directory")
    if directory.is_dir():
        others = [p.name for p in directory.iterdir() if p.name != f"{STEP}.converting"]
        if others:
            raise UserError(f"{directory} is not empty ({others[0]}); give the name of a new directory")


def complete(directory: Path, config: ModelConfig, arrays: dict[str, ArrayFile], checksums: dict[str, int]) -> None:
    """Writes all but the chunks: the arrays' descriptions, Orbax's own files, and our manifest."""
    small: list[Path] = []

    def put(name: str, text: str) -> None:
        (directory / name).write_text(text)
        small.append(directory / name)

    for name, array in arrays.items():
        grid = [range(n // c) for n, c in zip(array.shape, array.chunk)]
        for place in itertools.product(*grid):
            assert chunk_file(name, place, len(array.shape)) in checksums
        put(
            f"{PARAMS}/{name}/zarr.json",
            json.dumps(
                {
                    "zarr_format": 3,
                    "node_type": "array",
                    "shape": array.shape,
                    "data_type": str(array.dtype),
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.chunk}},
                    "chunk_key_encoding": {"name": "default"},
                    "codecs": BYTES_CODEC,
                    "fill_value": 0.0,
                }
            ),
        )
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": array.shape,
            },
        }
        for name, array in arrays.items()
    }
    put(
        f"{PARAMS}/_METADATA",
        json.dumps(
            {
                "tree_metadata": tree,
                "use_ocdbt": False,
                "use_zarr3": True,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
        ),
    )
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    now = time.time_ns()
    put(
        f"{TREE}/_CHECKPOINT_METADATA",
        json.dumps(
            {
                "item_handlers": {"params": handler},
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": now,
                "commit_timestamp_nsecs": now,
                "custom_metadata": {},
            }
        ),
    )
    put(f"{TREE}/orbax.checkpoint", "")
    put(f"{TREE}/commit_success.txt", "")
    sizes = {
        chunk_file(name, place, len(array.shape)): math.prod(array.chunk) * array.dtype.itemsize
        for name, array in arrays.items()
        for place in itertools.product(*(range(n // c) for n, c in zip(array.shape, array.chunk)))
    }
    files = {name: [size, checksums[name]] for name, size in sizes.items()}
    for path in small:
        text = path.read_bytes()
        files[path.relative_to(directory).as_posix()] = [len(text), zlib.crc32(text)]
    params = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    write_manifest(directory, step=STEP, config=config, params=params, files=files)


def sync(paths: list[Path]) -> None:
    """Makes files durable."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
