"""Checkpoints of a training run: asynchronous, sharded, atomic, exact to the bit; Orbax underneath.

    checkpoints = Checkpoints("runs/demo/checkpoints", config=model.config, keep=3, best="reward")
    graph, params = nnx.split(model)
    if found := checkpoints.restore(params=params, state=state):      # None in a new directory
        params, state, start = found.params, found.state, found.step
    ...
    checkpoints.save(step, params=params, state=state, arrays={"rollout": {...numpy...}}, meta={"seed": 0, ...},
                     metrics={"reward": 0.7})                         # returns once the values are copied
    ...
    checkpoints.wait()                                                # before the program ends; or use `with`

What goes where:
- ``params``: the model's parameters (``nnx.split(model)[1]``). On disk one tensor per layer under its official name
  (``m1jax.weights.names``), the experts of a layer together.
- ``state``: any pytree of arrays (optimizer state, random keys old and new style, counters). Comes back in the
  structure, dtypes and shardings of the target given to ``restore``; arrays or ``jax.ShapeDtypeStruct``s, on any mesh.
- ``arrays``: nested dicts of numpy arrays, any shapes, restored without a target (a rollout buffer). With several
  processes those of process 0 are kept, so give the same everywhere.
- ``meta``: what JSON can hold, floats and integers of any size exactly; tuples come back as lists.

A directory per step, named by its number, holds ``checkpoint.json`` (what is inside, and the size and CRC-32 of every
file), ``arrays.npz`` and Orbax's ``tree``. It is written beside its place and renamed when complete, so a half-written
one never looks whole; ``restore`` checks every byte, names what is damaged and takes the one before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from m1jax.checkpoint.manifest import (
    ARRAYS,
    MANIFEST,
    PARTIAL,
    TREE,
    Info,
    checksums,
    crc32,
    directories_within,
    find_problems,
    list_steps,
    listed,
    newest_within,
    read_info,
    write_manifest,
)
from m1jax.checkpoint.restoring import Restored, restore
from m1jax.checkpoint.saving import Saver
from m1jax.config import ModelConfig
from m1jax.errors import UserError

__all__ = [
    "ARRAYS",
    "MANIFEST",
    "PARTIAL",
    "TREE",
    "Checkpoints",
    "Info",
    "Restored",
    "checksums",
    "crc32",
    "directories_within",
    "find_problems",
    "list_steps",
    "newest_within",
    "read_info",
    "write_manifest",
]


class Checkpoints:
    """The checkpoints of one run in one directory. All processes make one and call it alike.

    Args:
        directory: made when the first checkpoint is saved; a file system that all processes share.
        config: the model's; ``restore`` refuses the checkpoint of another one.
        keep: how many of the newest to keep.
        best: name of a metric given to ``save``; the checkpoint where it is best is kept as well.
        best_is: whether the best value of that metric is the largest or the smallest.
        asynchronous: write in the background. An error then comes from the next ``save`` or ``wait``.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: ModelConfig,
        keep: int = 3,
        best: str | None = None,
        best_is: Literal["max", "min"] = "max",
        asynchronous: bool = True,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep = {keep}: at least one checkpoint must be kept")
        self.directory = Path(directory).absolute()
        self.config = config
        self.best_metric, self.best_is = best, best_is
        self._saver = Saver(self.directory, config, keep, self.best, asynchronous)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first. Interrupted saves are not among them; damaged ones are."""
        return list_steps(self.directory)

    def latest(self) -> int | None:
        """The newest step whose files are all there with their sizes, or None. Reads no contents."""
        return next((step for step in reversed(self.steps()) if not self.problems(step, contents=False)), None)

    def best(self) -> int | None:
        """The step where the metric ``best`` is best (the latest of equals), or None."""
        if self.best_metric is None:
            return None
        scored = []
        for step in self.steps():
            if not self.problems(step, contents=False):
                value = self.info(step).metrics.get(self.best_metric)
                if value is not None and not math.isnan(value):
                    scored.append((value if self.best_is == "max" else -value, step))
        return max(scored)[1] if scored else None

    def info(self, step: int) -> Info:
        """What is in the checkpoint of ``step``.

        Raises:
            UserError: there is none, or its ``checkpoint.json`` is damaged.
        """
        path = self.directory / str(step)
        if not path.is_dir():
            raise UserError(f"{self.directory} holds no checkpoint of step {step}; there are: {listed(self.steps())}")
        return read_info(path)

    def problems(self, step: int, *, contents: bool = True) -> list[str]:
        """What is damaged in the checkpoint of ``step``, one line each; empty if nothing is.

        Args:
            step: which one.
            contents: read every file and compare its CRC-32; otherwise only that files are there with their sizes.
                Several processes read a share each.
        """
        share = (jax.process_index(), jax.process_count())
        return find_problems(self.directory / str(step), contents=contents, share=share)

    def save(
        self,
        step: int,
        *,
        params: Any = None,
        state: Any = None,
        arrays: Mapping[str, Any] | None = None,
        meta: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a checkpoint; returns when the values are copied to host memory and may be changed or donated.

        One save runs at a time: a second one waits for the first. Saving a step again replaces it.

        Raises:
            UserError: the disk is full, here or in the save before; what was saved earlier is untouched.
        """
        self._saver.save(step, params, state, arrays, meta, metrics)

    def wait(self) -> None:
        """Returns when the last save is complete on disk.

        Raises:
            UserError: it failed because of the disk; the message says what is still there.
        """
        self._saver.wait()

    def restore(self, *, params: Any = None, state: Any = None, step: int | None = None) -> Restored | None:
        """Reads a checkpoint back, every byte checked: the newest that is whole, or the one of ``step``.

        Args:
            params: target for the parameters, a tree like the one saved whose leaves are arrays or
                ``jax.ShapeDtypeStruct``; values come back in their dtypes and shardings. None: not read.
            state: target for the state, likewise.
            step: which checkpoint; None for the newest. A damaged newest one is named in the log and passed over.

        Returns:
            None if the directory holds no checkpoint and no ``step`` was asked for.

        Raises:
            UserError: the checkpoint is of another config or has other parameters or state (named), the one asked
                for is damaged, or none is whole.
        """
        self.wait()
        return restore(self.directory, self.config, params, state, step)
