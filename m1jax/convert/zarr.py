"""A checkpoint's parameters, written file by file.

Orbax can only save a tree that is in memory as a whole. What it loads, however, is a directory per array of plain
Zarr 3: ``zarr.json`` and one file per chunk, which without compression holds nothing but the chunk's elements. Chunks
of contiguous rows make such a file a byte range of the official tensor.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m1jax.checkpoint import TREE, write_manifest
from m1jax.config import ModelConfig
from m1jax.disk import sync

STEP = 0  # of a checkpoint that no training made
PARAMS = f"{TREE}/params"
BYTES_CODEC = [{"name": "bytes", "configuration": {"endian": "little"}}]
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"


class ArrayFile(NamedTuple):
    """One array to be written: its shape, dtype and the shape of a chunk, which divides it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """The places of all chunks."""
        return itertools.product(*(range(n // c) for n, c in zip(self.shape, self.chunk)))


def chunk_file(name: str, place: tuple[int, ...], ndim: int) -> str:
    """The file of a chunk, relative to the checkpoint; ``place`` is its number along the first axes."""
    return f"{PARAMS}/{name}/c/" + "/".join(map(str, (*place, *(0,) * (ndim - len(place)))))


def complete(
    directory: Path, config: ModelConfig, arrays: Mapping[str, ArrayFile], checksums: Mapping[str, int]
) -> None:
    """Writes all but the chunks: the arrays' descriptions, Orbax's own files, and our manifest.

    Args:
        directory: of the checkpoint.
        config: the model's.
        arrays: by their names.
        checksums: CRC-32 of every chunk's file.
    """
    files: dict[str, list[int]] = {}
    for name, array in arrays.items():
        for place in array.chunks():
            file = chunk_file(name, place, len(array.shape))
            files[file] = [math.prod(array.chunk) * array.dtype.itemsize, checksums[file]]
    for name, text in _descriptions(arrays):
        (directory / name).write_text(text)
        sync(directory / name)
        files[name] = [len(text.encode()), zlib.crc32(text.encode())]
    params = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    write_manifest(directory, step=STEP, config=config, params=params, files=files)


def _descriptions(arrays: Mapping[str, ArrayFile]) -> Iterator[tuple[str, str]]:
    """(file, contents) of all small files."""
    for name, array in arrays.items():
        description = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": array.shape,
            "data_type": str(array.dtype),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.chunk}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": BYTES_CODEC,
            "fill_value": 0.0,
        }
        yield f"{PARAMS}/{name}/zarr.json", json.dumps(description)
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
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    yield f"{PARAMS}/_METADATA", json.dumps(metadata)
    now = time.time_ns()
    metadata = {
        "item_handlers": {"params": _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    yield f"{TREE}/_CHECKPOINT_METADATA", json.dumps(metadata)
    yield f"{TREE}/orbax.checkpoint", ""
    yield f"{TREE}/commit_success.txt", ""
