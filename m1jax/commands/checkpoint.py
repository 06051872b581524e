"""``m1jax checkpoint ls | show | verify``: what is in a directory of checkpoints, and whether it is whole."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Annotated

import tyro

from m1jax.checkpoint import (
    MANIFEST,
    PARTIAL,
    Info,
    directories_within,
    find_problems,
    list_steps,
    newest_within,
    read_info,
)
from m1jax.errors import UserError, shortened


@dataclasses.dataclass(frozen=True)
class ListConfig:
    """Lists the checkpoints of a run: step, when, size, what is inside, metrics, and whether all files are there."""

    directory: Annotated[Path, tyro.conf.Positional]
    """A directory of checkpoints, or a run's directory."""


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """Shows what one checkpoint holds."""

    path: Annotated[Path, tyro.conf.Positional]
    """A checkpoint, a directory of them, or a run (the newest that is whole)."""
    tensors: bool = False
    """List every array with its dtype and shape."""


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Reads every byte and compares it with the checksums made when it was saved. Status 2 if something is damaged."""

    path: Annotated[Path, tyro.conf.Positional]
    """A checkpoint, a directory of them, or a run (all of its checkpoints)."""


def ls(config: ListConfig) -> None:
    """Prints a line per checkpoint, oldest first.

    Raises:
        UserError: there is none.
    """
    for directory in directories_within(config.directory):
        rows = [("step", "saved", "size", "holds", "metrics", "state")]
        for step in list_steps(directory):
            path = directory / str(step)
            if problems := find_problems(path, contents=False):
                rows.append((str(step), "", "", "", "", f"damaged: {problems[0]}"))
            else:
                info = read_info(path)
                metrics = ", ".join(f"{name} {value:.4g}" for name, value in info.metrics.items())
                rows.append((str(step), _when(info), f"{info.size / 1e6:,.1f} MB", _holds(info), metrics, "complete"))
        print(f"{directory}:")
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        for partial in sorted(directory.glob(f"*{PARTIAL}")):
            print(f"{partial.name}: a save in progress, or interrupted")


def show(config: ShowConfig) -> None:
    """Prints a checkpoint's step, config, metrics, meta and sizes; with ``tensors`` its arrays too.

    Raises:
        UserError: there is none, or its description is damaged.
    """
    info = read_info(newest_within(config.path))
    print(f"{info.path}: step {info.step}, saved {_when(info)}, {info.size:,} bytes in {len(info.files)} files")
    print(f"holds: {_holds(info)}")
    for title, values in (("config", info.config), ("metrics", info.metrics), ("meta", info.meta)):
        if values:
            print(f"{title}:")
            for name, value in values.items() if isinstance(values, dict) else [("", values)]:
                print(f"  {name} = {_short(value)}")
    if config.tensors:
        for kind, arrays in (("params", info.params), ("state", info.state), ("arrays", info.arrays)):
            for name, (dtype, shape) in arrays.items():
                print(f"{kind}  {name}  {dtype}  {shape}")


def verify(config: VerifyConfig) -> None:
    """Prints a line per checkpoint that is whole.

    Raises:
        UserError: one is damaged, or there is none; the message names checkpoint and file.
    """
    if (config.path / MANIFEST).is_file():
        paths = [config.path]
    else:
        directories = directories_within(config.path)
        paths = [directory / str(step) for directory in directories for step in list_steps(directory)]
    damaged = []
    for path in paths:
        if problems := find_problems(path):
            damaged.append(f"{path}: {shortened(problems, 1)}")
        else:
            print(f"{path}: complete, {read_info(path).size:,} bytes as they were written")
    if damaged:
        raise UserError("damaged: " + "; ".join(damaged))


def _when(info: Info) -> str:
    return datetime.datetime.fromtimestamp(info.saved).isoformat(" ", "seconds")


def _holds(info: Info) -> str:
    kinds = {"params": info.params, "state": info.state, "arrays": info.arrays}
    return ", ".join(f"{kind} ({len(names)})" for kind, names in kinds.items() if names) or "nothing"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."
