"""Reading a checkpoint back: the newest that is whole, onto any mesh and dtype."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m1jax import processes
from m1jax.checkpoint.manifest import (
    ARRAYS,
    PARTIAL,
    TREE,
    Info,
    find_problems,
    jsonable,
    list_steps,
    listed,
    log,
    read_info,
)
from m1jax.checkpoint.options import context
from m1jax.checkpoint.trees import leaves, orbax_target, per_layer_targets, stacked, stored, unnamed
from m1jax.config import ModelConfig
from m1jax.errors import UserError, shortened


class Restored(NamedTuple):
    """A checkpoint read back. ``params`` and ``state`` are None where no target was given."""

    step: int
    params: Any
    state: Any
    arrays: dict[str, Any]
    meta: Any
    metrics: dict[str, float]


def restore(directory: Path, config: ModelConfig, params: Any, state: Any, step: int | None) -> Restored | None:
    """See `Checkpoints.restore`."""
    if step is not None:
        if problems := _problems_anywhere(directory / str(step)):
            raise UserError(f"{directory / str(step)} is damaged: {shortened(problems)}")
        return _read(directory / str(step), config, params, state)
    steps = processes.from_first(list_steps(directory))  # a checkpoint may appear between two looks
    if directory.is_dir() and processes.writes():
        for entry in sorted(directory.glob(f"*{PARTIAL}")):
            log.warning("%s is an interrupted save; it is ignored and will be removed", entry)
    for number in reversed(steps):
        if not (problems := _problems_anywhere(directory / str(number))):
            return _read(directory / str(number), config, params, state)
        path = directory / str(number)
        log.warning("checkpoint %s is damaged and passed over: %s", path, shortened(problems))
    if steps:
        raise UserError(
            f"{directory}: none of the checkpoints {listed(steps)} is whole; to start anew, move the directory away"
        )
    return None


def _problems_anywhere(path: Path) -> list[str]:
    problems = find_problems(path, share=(jax.process_index(), jax.process_count()))
    damaged = processes.any_of(bool(problems))
    return problems or (["another process found it damaged"] if damaged else [])


def _read(path: Path, config: ModelConfig, params: Any, state: Any) -> Restored:
    import orbax.checkpoint.experimental.v1 as ocp

    info = read_info(path)
    _check_config(info, config)
    wanted: dict[str, dict[str, Any]] = {}
    if params is not None:
        wanted["params"] = per_layer_targets(params, config)
        _compare(info, "parameters", info.params, wanted["params"])
    if state is not None:
        wanted["state"] = {name: stored(leaf) for name, leaf in leaves(state)}
        _compare(info, "state", info.state, wanted["state"])
    # Orbax reads into shardings; what has none is read as numpy and stays uncommitted.
    targets = {
        kind: {name: orbax_target(leaf) for name, leaf in tree.items() if math.prod(leaf.shape)}
        for kind, tree in wanted.items()
    }
    targets = {kind: tree for kind, tree in targets.items() if tree}
    read: dict[str, dict[str, Any]] = {}
    if targets:
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            read = ocp.load_checkpointables(str(info.path / TREE), targets)
    for kind, tree in wanted.items():
        for name, leaf in tree.items():
            if not math.prod(leaf.shape):
                read.setdefault(kind, {})[name] = np.zeros(leaf.shape, leaf.dtype)
    return Restored(
        info.step,
        None if params is None else stacked(params, read["params"], config),
        None if state is None else unnamed(state, read.get("state", {}), info),
        _read_arrays(info),
        info.meta,
        info.metrics,
    )


def _check_config(info: Info, config: ModelConfig) -> None:
    here = jsonable(config)
    if info.config is None or info.config == here:
        return
    differ = [
        f"{key} is {info.config.get(key)!r} there, {here.get(key)!r} here"
        for key in here | info.config
        if info.config.get(key) != here.get(key)
    ]
    raise UserError(f"{info.path} is a checkpoint of another model: {shortened(differ)}")


def _compare(info: Info, what: str, there: dict[str, list[Any]], here: dict[str, Any]) -> None:
    differ = [f"{name} is only there" for name in there if name not in here]
    differ += [f"{name} is only here" for name in here if name not in there]
    for name, (_, shape) in there.items():
        if name in here and list(here[name].shape) != shape:
            differ.append(f"{name} is {shape} there, {list(here[name].shape)} here")
    if differ:
        raise UserError(f"{info.path} holds other {what} than this run: {shortened(differ)}")


def _read_arrays(info: Info) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if not info.arrays:
        return out
    with np.load(info.path / ARRAYS, allow_pickle=False) as file:
        for name, (dtype, _) in info.arrays.items():
            *parents, last = name.split("/")
            place = out
            for parent in parents:
                place = place.setdefault(parent, {})
            value = file[name]
            # numpy's files know bfloat16 and its relatives only as two bytes of anything
            place[last] = value.view(jnp.dtype(dtype)) if value.dtype.kind == "V" else value
    return out
