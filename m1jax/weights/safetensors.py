"""Directories of safetensors files, read and written by byte range.

A file is 8 bytes (the header's length, little endian), a JSON header (name -> dtype, shape, data_offsets) and the
tensors' bytes. Everything needed to place a byte is in the headers, so tensors are read through memory maps and written
with ``pwrite`` at their final place, by any number of threads or processes at once.
"""

from __future__ import annotations

import itertools
import json
import mmap
import operator
import os
import re
import struct
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from m1jax.disk import check_space, writing
from m1jax.errors import UserError, shortened
from m1jax.weights.names import Merged

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
HEADER_LIMIT = 100 * 2**20  # what the safetensors library accepts

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where one tensor lies: ``count`` bytes from ``start`` of ``file``."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    count: int


class Weights:
    """The tensors of one directory, by name. Opening reads the headers only; contents come through memory maps.

    Raises:
        UserError: no weights, a missing or truncated shard, a damaged header or index; all that is wrong is told.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        index = self.directory / INDEX
        problems: list[str] = []
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UserError(f"{index}: no weight_map; the index is damaged")
            shards = sorted(set(weight_map.values()))
        elif (self.directory / SINGLE).is_file():
            weight_map, shards = None, [SINGLE]
        else:
            raise UserError(f"{self.directory}: neither {INDEX} nor {SINGLE} is there; is this a model's directory?")
        for shard in shards:
            if Path(shard).name != shard:
                raise UserError(f"{index}: {shard!r} is no plain file name")
            try:
                found = read_header(self.directory / shard)
            except UserError as error:
                problems.append(str(error))
                continue
            for name, entry in found.items():
                if name in self.entries:
                    problems.append(f"{name} is in {self.entries[name].file.name} and in {shard}")
                self.entries[name] = entry
            if weight_map is not None:
                promised = {name for name, file in weight_map.items() if file == shard}
                problems += [
                    f"{shard} lacks {name}, which the index promises" for name in sorted(promised - set(found))
                ]
                problems += [
                    f"{shard} holds {name}, which the index does not know" for name in sorted(set(found) - promised)
                ]
        if problems:
            raise UserError(f"{self.directory}: {shortened(problems)}")

    def array(self, name: str) -> np.ndarray:
        """A read-only view of one tensor, backed by the file."""
        entry = self.entries[name]
        flat = np.frombuffer(self._map(entry.file), np.uint8, entry.count, entry.start)
        if entry.start % entry.dtype.itemsize:  # allowed by the format, and what our own writer never makes
            flat = flat.copy()
        return flat.view(entry.dtype).reshape(entry.shape)

    def _map(self, file: Path) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                with open(file, "rb") as handle:
                    self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            return self._maps[file]

    def release(self, name: str) -> None:
        """Tells the kernel that a tensor's pages will not be needed again, so that they do not crowd out others'."""
        entry = self.entries[name]
        first = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (entry.start + entry.count - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            self._map(entry.file).madvise(mmap.MADV_DONTNEED, first, length)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
        UserError: the file is missing, truncated, or no safetensors file.
    """
    try:
        with open(file, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise UserError(f"{file}: truncated, or no safetensors file ({size:,} bytes)")
            header = json.loads(handle.read(length))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its safetensors header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: its safetensors header is damaged (no object)")
    entries, end = {}, 8 + length
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        try:
            dtype, shape = tensor["dtype"], tuple(map(operator.index, tensor["shape"]))
            begin, stop = map(operator.index, tensor["data_offsets"])
            count = int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize if dtype in DTYPES else stop - begin
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{file}: its safetensors header is damaged (at {name})") from error
        if dtype not in DTYPES:
            raise UserError(f"{file}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
        if not 0 <= begin <= stop or stop - begin != count:
            raise UserError(f"{file}: {name} {list(shape)} {dtype} does not fill its {stop - begin:,} bytes")
        entries[name] = Entry(file, DTYPES[dtype], shape, 8 + length + begin, count)
        end = max(end, 8 + length + stop)
    placed = sorted(entries.items(), key=lambda item: item[1].start)
    for (before, first), (name, second) in itertools.pairwise(placed):
        if first.start + first.count > second.start:
            raise UserError(f"{file}: its safetensors header is damaged ({before} and {name} overlap)")
    if size < end:
        raise UserError(f"{file}: truncated: {size:,} bytes instead of {end:,}; download or copy it again")
    return entries


class Plan:
    """A directory of safetensors files to be written: every byte's place, known before the first is written.

    Tensors keep their order; a new shard begins where the next would make one larger than ``shard_bytes``.
    """

    def __init__(
        self, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        shards: list[list[tuple[str, tuple[int, ...], np.dtype, int]]] = [[]]
        filled = 0
        for name, shape, dtype in tensors:
            count = int(np.prod(shape, dtype=object)) * dtype.itemsize
            if shards[-1] and filled + count > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, shape, dtype, count))
            filled += count
        total = len(shards)
        self.headers: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.entries: dict[str, Entry] = {}
        for number, shard in enumerate(shards, 1):
            file = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # Transformers refuses files without it
            offset = 0
            # Wide dtypes first, as the safetensors library does: then every tensor is aligned to its own.
            for name, shape, dtype, count in sorted(shard, key=lambda tensor: -tensor[2].itemsize):
                header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + count]}
                offset += count
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self.headers[file] = struct.pack("<Q", len(text)) + text
            self.sizes[file] = len(self.headers[file]) + offset
            for name, shape, dtype, count in shard:
                begin = header[name]["data_offsets"][0]  # pyright: ignore[reportIndexIssue]
                self.entries[name] = Entry(Path(file), dtype, shape, len(self.headers[file]) + begin, count)
        self._whole = self.entries

    def place_parts(self, merged: Iterable[Merged]) -> None:
        """Lets the official tensors in merged ones be written by their own names."""
        self._whole = dict(self.entries)
        self.entries = unmerged(self.entries, merged)

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, the index's ``total_size``."""
        return sum(entry.count for entry in self._whole.values())

    def index(self) -> bytes | None:
        """The contents of the index file; None for a single file, which has none."""
        if len(self.headers) == 1:
            return None
        weight_map = {name: entry.file.name for name, entry in self._whole.items()}
        return json.dumps({"metadata": {"total_size": self.total_size}, "weight_map": weight_map}, indent=2).encode()


class Writer:
    """Files of a plan being written into a directory that exists; ``write`` may be called from any thread.

    Raises:
        UserError: there is not enough space for all of it.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory, self.plan = directory, plan
        self._files: dict[str, int] = {}
        needed = sum(plan.sizes.values())
        check_space(directory, needed)
        try:
            for name, header in plan.headers.items():
                with writing(directory / name, needed):
                    self._files[name] = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o666)
                    os.ftruncate(self._files[name], plan.sizes[name])
                    os.pwrite(self._files[name], header, 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes one tensor (shape and dtype as planned, in any memory order) at its place."""
        entry = self.plan.entries[name]
        assert (values.shape, values.dtype) == (entry.shape, entry.dtype), name
        with writing(self.directory / entry.file, entry.count):
            write_all(self._files[entry.file.name], values, entry.start)

    def finish(self) -> None:
        """Writes the index and makes everything durable."""
        if (index := self.plan.index()) is not None:
            with writing(self.directory / INDEX):
                (self.directory / INDEX).write_bytes(index)
        for name, descriptor in self._files.items():
            with writing(self.directory / name):
                os.fsync(descriptor)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; what was not finished stays unfinished."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}


def write_all(descriptor: int, values: np.ndarray, start: int) -> None:
    """``pwrite`` of a whole array's elements, in C order, at ``start``."""
    view, written = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data), 0
    while written < len(view):
        written += os.pwrite(descriptor, view[written:], start + written)


def finite(values: np.ndarray) -> bool:
    """Whether all values are numbers. On the bits, a block at a time: no copies of what numpy has no type for."""
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[values.dtype.itemsize]
    exponent = np.array(np.inf, values.dtype).view(bits)
    flat = values.reshape(-1).view(bits)
    return all(not ((flat[i : i + (1 << 20)] & exponent) == exponent).any() for i in range(0, flat.size, 1 << 20))


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values in another dtype; what lies beyond its range becomes infinity, without a warning."""
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def unmerged(entries: Mapping[str, Entry], merged: Iterable[Merged]) -> dict[str, Entry]:
    """The official tensors where Transformers' merged ones lie; entries that are none stay.

    Raises:
        UserError: a merged tensor has another shape than the config says.
    """
    out = dict(entries)
    for whole in merged:
        entry = entries.get(whole.name)
        if entry is None or whole.parts[0][0] == whole.name:
            continue
        if entry.shape != whole.shape:
            raise UserError(f"{entry.file}: {whole.name} is {list(entry.shape)}, the config says {list(whole.shape)}")
        del out[whole.name]
        count = int(np.prod(whole.part_shape)) * entry.dtype.itemsize
        for name, first in whole.parts:
            start = entry.start + first * entry.dtype.itemsize
            out[name] = Entry(entry.file, entry.dtype, whole.part_shape, start, count)
    return out


def read_json(file: Path) -> dict:
    """A JSON object from a file; UserError if it is missing or something else."""
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); is this a model's directory?") from error
    except (ValueError, RecursionError) as error:  # the latter from lists in lists in lists
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a JSON object")
    return values


def compare(where: object, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every expected tensor there with its shape, and nothing else; all differences in one error.

    Buffers that Transformers writes beside the parameters (decay tables that follow from the config) may be there.

    Raises:
        UserError: what is missing, unknown or of another shape.
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unknown tensor {name}" for name in found if name not in expected and not BUFFER.fullmatch(name)]
    problems += [
        f"{name} is {list(found[name])}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        raise UserError(f"{where}: not the tensors of its config.json: {shortened(problems)}")


BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)")
