"""One checkpoint on disk: what `checkpoint.json` says about it, and whether all of it is there as it was written."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m1jax.config import ModelConfig
from m1jax.errors import UserError, shortened
from m1jax.weights.directory import CHECKPOINTS, MANIFEST

ARRAYS = "arrays.npz"
TREE = "tree"
PARTIAL = ".partial"
REPLACED = ".replaced"
FORMAT = 1

log = logging.getLogger("m1jax.checkpoint")


@dataclasses.dataclass(frozen=True)
class Info:
    """What ``checkpoint.json`` says about one checkpoint; sizes in bytes, ``saved`` in seconds since 1970."""

    step: int
    path: Path
    saved: float
    config: dict[str, Any] | None
    metrics: dict[str, float]
    meta: Any
    params: dict[str, list[Any]]
    state: dict[str, list[Any]]
    keys: dict[str, str]
    arrays: dict[str, list[Any]]
    files: dict[str, list[int]]

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.files.values())


def list_steps(directory: Path) -> list[int]:
    """Steps with a checkpoint in a directory, oldest first; damaged ones too, interrupted saves not."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal())


def newest_whole(directory: Path) -> Path:
    """The newest checkpoint of a directory that is whole, as far as the sizes of its files tell; UserError if none."""
    for step in reversed(list_steps(directory)):
        if not (problems := find_problems(directory / str(step), contents=False)):
            return directory / str(step)
        log.warning("checkpoint %s is damaged and passed over: %s", directory / str(step), shortened(problems))
    raise UserError(f"{directory} holds no whole checkpoint")


def directories_within(path: Path) -> list[Path]:
    """The directories of checkpoints that a path means: itself, or those of a run and its phases; UserError if none."""
    within = [path, path / CHECKPOINTS]
    within += [phase for place in within if place.is_dir() for phase in sorted(place.iterdir()) if phase.is_dir()]
    found = [place for place in within if list_steps(place)]
    if not found:
        raise UserError(f"{path} holds no checkpoints")
    return found


def newest_within(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest whole one in it, whatever the phase; UserError if none.

    Whole as far as the sizes of files tell.
    """
    if (path / MANIFEST).is_file():
        return path
    newest = [newest_whole(directory) for directory in directories_within(path)]
    return max(newest, key=lambda checkpoint: read_info(checkpoint).saved)


def read_info(path: Path) -> Info:
    """What is in the checkpoint at ``path``; UserError if its ``checkpoint.json`` is missing or damaged."""
    try:
        text = (path / MANIFEST).read_text()
        checksum, body = text.split("\n", 1)
        if int(checksum, 16) != zlib.crc32(body.encode()):
            raise ValueError("its checksum does not match")
        values = json.loads(body)
    except (OSError, ValueError) as error:
        raise UserError(f"{path / MANIFEST} is missing or damaged ({error})") from error
    if (version := values.pop("format")) != FORMAT:
        raise UserError(f"{path} was written by another version of m1jax (format {version}, this one reads {FORMAT})")
    return Info(path=path, **values)


def find_problems(path: Path, *, contents: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is damaged in the checkpoint at ``path``; see ``Checkpoints.problems``.

    Args:
        path: the checkpoint.
        contents: whether files are read, beside looking for them and at their sizes.
        share: (which, of how many) of the files this process reads.
    """
    try:
        info = read_info(path)
    except UserError as error:
        return [str(error)]
    found = []
    for name, (size, _) in sorted(info.files.items()):
        try:
            actual = (info.path / name).stat().st_size
        except OSError:
            found.append(f"{name} is missing")
            continue
        if actual != size:
            found.append(f"{name} has {actual:,} bytes instead of {size:,}")
    if contents and not found:
        mine = sorted(info.files)[share[0] :: share[1]]
        for name, checksum in zip(mine, checksums([info.path / name for name in mine])):
            if checksum != info.files[name][1]:
                found.append(f"the contents of {name} have changed since they were written")
    return found


def write_manifest(
    path: Path, *, step: int, config: ModelConfig, params: dict[str, list[Any]], files: dict[str, list[int]]
) -> None:
    """Makes a directory of Orbax files a checkpoint that holds parameters only.

    Args:
        path: the directory, with the files under ``tree``.
        step: its number.
        config: the model's.
        params: name -> [dtype, shape].
        files: path -> [size, CRC-32] of every file.
    """
    nothing: dict[str, Any] = {"metrics": {}, "meta": None, "state": {}, "keys": {}, "arrays": {}}
    values = {"format": FORMAT, "step": step, "saved": time.time(), "config": jsonable(config)}
    write_values(path, values | nothing | {"params": params, "files": files})


def write_values(path: Path, values: dict[str, Any]) -> None:
    """Writes `checkpoint.json`, with a checksum of its own, to the disk itself."""
    body = json.dumps(values)
    with open(path / MANIFEST, "w") as file:
        file.write(f"{zlib.crc32(body.encode()):08x}\n{body}")
        file.flush()
        os.fsync(file.fileno())


def checksums(paths: list[Path]) -> list[int]:
    """CRC-32 of several files."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(crc32, paths))


def crc32(path: Path) -> int:
    """CRC-32 of a file's contents."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def jsonable(config: ModelConfig) -> dict[str, Any]:
    """A config as it stands in `checkpoint.json`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def listed(steps: list[int]) -> str:
    """Steps, for messages."""
    return ", ".join(map(str, steps)) or "none"
