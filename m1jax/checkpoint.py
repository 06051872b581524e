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
  (``m1jax.convert.names``), the experts of a layer together.
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

import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from m1jax.config import ModelConfig
from m1jax.convert.names import Tensor, tensors
from m1jax.errors import UserError

MANIFEST = "checkpoint.json"
ARRAYS = "arrays.npz"
TREE = "tree"
PARTIAL = ".partial"
REPLACED = ".replaced"
FORMAT = 1
CHUNK_BYTES = 128 * 2**20
OTHERS_TIMEOUT = 1800  # seconds that process 0 waits for the checksums of the others, and they for its rename

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint read back. ``params`` and ``state`` are None where no target was given."""

    step: int
    params: Any
    state: Any
    arrays: dict[str, Any]
    meta: Any
    metrics: dict[str, float]


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
        self.keep = keep
        self.best_metric, self.best_is = best, best_is
        self.asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    # ------------------------------------------------------------------------------------------------ what is there

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first. Interrupted saves are not among them; damaged ones are."""
        return list_steps(self.directory)

    def latest(self) -> int | None:
        """The newest step whose files are all there with their sizes, or None. Reads no contents."""
        return next((step for step in reversed(self.steps()) if not self.problems(step, contents=False)), None)

    def best(self) -> int | None:
        """The step where the metric ``best`` is best (the latest of equals), or None."""
        scored = []
        for step in self.steps():
            if not self.problems(step, contents=False):
                value = self.info(step).metrics.get(self.best_metric or "")
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
            raise UserError(f"{self.directory} holds no checkpoint of step {step}; there are: {_listed(self.steps())}")
        return read_info(path)

    def problems(self, step: int, *, contents: bool = True) -> list[str]:
        """What is damaged in the checkpoint of ``step``, one line each; empty if nothing is.

        Args:
            step: which one.
            contents: read every file and compare its CRC-32; otherwise only that files are there with their sizes.
                Several processes read a share each.
        """
        return find_problems(self.directory / str(step), contents=contents)

    # -------------------------------------------------------------------------------------------------------- saving

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
        import orbax.checkpoint.experimental.v1 as ocp

        self.wait()
        trees: dict[str, dict[str, Any]] = {}
        if params is not None:
            trees["params"] = _unstacked(params, self.config)
        keys: dict[str, str] = {}
        if state is not None:
            trees["state"], keys = _named(state)
        host = {name: np.array(value) for name, value in _flat(arrays or {})}
        manifest = {
            "format": FORMAT,
            "step": step,
            "saved": time.time(),
            "config": _jsonable(self.config),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "meta": meta,
            "params": {name: [str(x.dtype), list(x.shape)] for name, x in trees.get("params", {}).items()},
            "state": {name: [str(x.dtype), list(x.shape)] for name, x in trees.get("state", {}).items()},
            "keys": keys,
            "arrays": {name: [str(x.dtype), list(x.shape)] for name, x in host.items()},
        }
        json.dumps(manifest)  # a meta that JSON cannot hold fails here and not in the background
        # Orbax refuses arrays without elements; their dtype and shape in the manifest are all there is to them.
        trees = {kind: {name: x for name, x in tree.items() if x.size} for kind, tree in trees.items()}
        trees = {kind: tree for kind, tree in trees.items() if tree}

        partial = self.directory / f"{step}{PARTIAL}"
        size = sum(x.nbytes for tree in (*trees.values(), host) for x in tree.values())
        failure: BaseException | None = None
        if jax.process_index() == 0:
            try:
                self._clean()
                self.directory.mkdir(parents=True, exist_ok=True)
                self._check_space(step, size)
                partial.mkdir()
            except (OSError, UserError) as error:
                failure = self._explained(error, step)
        if jax.process_count() > 1 and any(_from_all(failure is not None)) and failure is None:
            failure = UserError(f"{self.directory}: process 0 could not begin the checkpoint of step {step}; see there")
        if failure is not None:
            raise failure
        response = None
        if trees:
            try:
                with _context():
                    response = ocp.save_checkpointables_async(str(partial / TREE), trees)
            except Exception as error:
                raise self._explained(error, step) from error

        def finish() -> None:
            try:
                if response is not None:
                    response.result()
                self._finish(partial, manifest, host)
            except BaseException as error:
                self._error = self._explained(error, step)
                if jax.process_index() == 0:
                    shutil.rmtree(partial, ignore_errors=True)

        self._thread = threading.Thread(target=finish, name=f"checkpoint-{step}")
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete on disk.

        Raises:
            UserError: it failed because of the disk; the message says what is still there.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _finish(self, partial: Path, manifest: dict[str, Any], host: dict[str, np.ndarray]) -> None:
        """The part in the background: checksums by all processes; manifest, rename and pruning by process 0."""
        process, count = jax.process_index(), jax.process_count()
        final = self.directory / str(manifest["step"])
        if process == 0 and host:
            with open(partial / ARRAYS, "wb") as file:
                np.savez(file, allow_pickle=False, **host)
        # The files of the tree are complete on every process here: Orbax ends with a barrier. Who has its checksums
        # says so by a file, so no collective runs beside the training's own.
        paths = sorted(path for path in (partial / TREE).rglob("*") if path.is_file())
        mine = paths[process::count]
        sums = {
            path.relative_to(partial).as_posix(): [path.stat().st_size, checksum]
            for path, checksum in zip(mine, _checksums(mine))
        }
        if process != 0:
            written = partial / f"sums-{process}.json.new"
            written.write_text(json.dumps(sums))
            written.rename(partial / f"sums-{process}.json")
            _await(lambda: final.exists() and not partial.exists(), f"process 0 to complete {final}")
            return
        for other in range(1, count):
            file = partial / f"sums-{other}.json"
            _await(file.exists, f"process {other} to write {file}")
            sums |= json.loads(file.read_text())
            file.unlink()
        if host:
            sums[ARRAYS] = [(partial / ARRAYS).stat().st_size, *_checksums([partial / ARRAYS])]
        _write_manifest(partial, manifest | {"files": sums})
        replaced = self.directory / f"{final.name}{REPLACED}"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _sync_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep :], self.best() if self.best_metric else None}
        for step in set(steps) - kept:
            # Renamed first, so that what a kill leaves behind does not look like a checkpoint.
            doomed = self.directory / f"{step}{PARTIAL}"
            shutil.rmtree(doomed, ignore_errors=True)
            (self.directory / str(step)).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _clean(self) -> None:
        """Removes what a killed process left behind; a replaced checkpoint without its successor goes back."""
        if not self.directory.is_dir():
            return
        for entry in list(self.directory.iterdir()):
            if entry.name.endswith(REPLACED):
                original = entry.with_name(entry.name.removesuffix(REPLACED))
                if original.exists():
                    shutil.rmtree(entry)
                else:
                    entry.rename(original)
            elif entry.name.endswith(PARTIAL):
                shutil.rmtree(entry)

    def _check_space(self, step: int, needed: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"{self.directory}: the checkpoint of step {step} needs {_bytes(needed)}, {_bytes(free)} are free. "
                f"Nothing was written; saved and whole: {_listed(self.steps())}"
            )

    def _explained(self, error: BaseException, step: int) -> BaseException:
        text = str(error)
        if getattr(error, "errno", None) == 28 or "No space left" in text or "ENOSPC" in text:
            return UserError(
                f"{self.directory}: the disk is full, the checkpoint of step {step} was not saved. "
                f"Saved and whole: {_listed(self.steps())}; free some space and start again"
            )
        if isinstance(error, OSError):
            return UserError(f"{self.directory}: the checkpoint of step {step} was not saved: {error}")
        return error

    # ----------------------------------------------------------------------------------------------------- restoring

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
        if step is not None:
            if problems := self._problems_anywhere(step):
                raise UserError(f"{self.directory / str(step)} is damaged: {_shortened(problems)}")
            return self._read(step, params, state)
        steps = _from_first_process(self.steps())
        if self.directory.is_dir() and jax.process_index() == 0:
            for entry in sorted(self.directory.glob(f"*{PARTIAL}")):
                log.warning("%s is an interrupted save; it is ignored and will be removed", entry)
        for number in reversed(steps):
            if not (problems := self._problems_anywhere(number)):
                return self._read(number, params, state)
            path = self.directory / str(number)
            log.warning("checkpoint %s is damaged and passed over: %s", path, _shortened(problems))
        if steps:
            raise UserError(
                f"{self.directory}: none of the checkpoints {_listed(steps)} is whole; "
                "to start anew, move the directory away"
            )
        return None

    def _problems_anywhere(self, step: int) -> list[str]:
        problems = self.problems(step)
        if jax.process_count() == 1 or not any(_from_all(len(problems))):
            return problems
        return problems or ["another process found it damaged"]

    def _read(self, step: int, params: Any, state: Any) -> Restored:
        import orbax.checkpoint.experimental.v1 as ocp

        info = self.info(step)
        self._check_config(info)
        wanted: dict[str, dict[str, Any]] = {}
        if params is not None:
            wanted["params"] = _per_layer_targets(params, self.config)
            _compare(info, "parameters", info.params, wanted["params"])
        if state is not None:
            wanted["state"] = {name: _stored(leaf) for name, leaf in _leaves(state)}
            _compare(info, "state", info.state, wanted["state"])
        # Orbax reads into shardings; what has none is read as numpy and stays uncommitted.
        targets = {
            kind: {name: _orbax_target(leaf) for name, leaf in tree.items() if math.prod(leaf.shape)}
            for kind, tree in wanted.items()
        }
        targets = {kind: tree for kind, tree in targets.items() if tree}
        read: dict[str, dict[str, Any]] = {}
        if targets:
            with _context(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                read = ocp.load_checkpointables(str(info.path / TREE), targets)
        for kind, tree in wanted.items():
            for name, leaf in tree.items():
                if not math.prod(leaf.shape):
                    read.setdefault(kind, {})[name] = np.zeros(leaf.shape, leaf.dtype)
        return Restored(
            step,
            None if params is None else _stacked(params, read["params"], self.config),
            None if state is None else _unnamed(state, read.get("state", {}), info),
            _read_arrays(info),
            info.meta,
            info.metrics,
        )

    def _check_config(self, info: Info) -> None:
        here = _jsonable(self.config)
        if info.config is None or info.config == here:
            return
        differ = [
            f"{key} is {info.config.get(key)!r} there, {here.get(key)!r} here"
            for key in here | info.config
            if info.config.get(key) != here.get(key)
        ]
        raise UserError(f"{info.path} is a checkpoint of another model: {_shortened(differ)}")


# ------------------------------------------------------------------------------------------------- one checkpoint


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
        log.warning("checkpoint %s is damaged and passed over: %s", directory / str(step), _shortened(problems))
    raise UserError(f"{directory} holds no whole checkpoint")


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


def find_problems(path: Path, *, contents: bool = True) -> list[str]:
    """What is damaged in the checkpoint at ``path``; see ``Checkpoints.problems``."""
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
        mine = sorted(info.files)[jax.process_index() :: jax.process_count()]
        for name, checksum in zip(mine, _checksums([info.path / name for name in mine])):
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
    values = {"format": FORMAT, "step": step, "saved": time.time(), "config": _jsonable(config)}
    _write_manifest(path, values | nothing | {"params": params, "files": files})


def _write_manifest(path: Path, values: dict[str, Any]) -> None:
    body = json.dumps(values)
    with open(path / MANIFEST, "w") as file:
        file.write(f"{zlib.crc32(body.encode()):08x}\n{body}")
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------- trees and names


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(state: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves of a state by name, typed random keys as their data, and the implementations of those keys."""
    named, keys = {}, {}
    for name, leaf in _leaves(state):
        if _is_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        named[name] = _global(leaf)
    return named, keys


def _global(leaf: Any) -> Any:
    """An array that Orbax can save: one process' own array becomes numpy, of which process 0 saves its copy."""
    if isinstance(leaf, jax.Array) and not (jax.process_count() > 1 and leaf.is_fully_addressable):
        return leaf
    return np.array(leaf)


def _stored(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding in which a target's leaf is read."""
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        # The data has one more axis at the end; a sharding of the key applies to it as it is.
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_sharding(leaf))
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))


def _sharding(leaf: Any) -> Any:
    """Where a target's leaf wants to be, or None where it is left to jax (numpy, uncommitted, no sharding)."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and jax.process_count() > 1 and sharding.is_fully_addressable:
        return None
    return sharding


def _orbax_target(leaf: jax.ShapeDtypeStruct) -> Any:
    return leaf if leaf.sharding is not None else np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _unnamed(state: Any, read: dict[str, Any], info: Info) -> Any:
    structure = jax.tree.structure(state)
    out = []
    for name, leaf in _leaves(state):
        value = read[name]
        if _is_key(leaf):
            impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else info.keys.get(name)
            if info.keys.get(name) != impl:
                raise UserError(f"{info.path}: the random key {name} is {info.keys.get(name)} there, {impl} here")
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
        elif isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            value = value if isinstance(value, jax.Array) else jnp.asarray(value)
        elif not isinstance(leaf, np.ndarray):
            value = type(leaf)(value.item())
        out.append(value)
    return jax.tree.unflatten(structure, out)


def _paths(params: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Paths as in the table of names: ("layers", 0, "moe", "w1"). Flax's own "value" at the end is left out."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        parts = []
        for part in path:
            if isinstance(part, jax.tree_util.DictKey):
                parts.append(part.key)
            elif isinstance(part, jax.tree_util.SequenceKey):
                parts.append(part.idx)
        yield tuple(parts), leaf


@functools.lru_cache(maxsize=8)
def _by_path(config: ModelConfig) -> dict[tuple[str | int, ...], list[Tensor]]:
    places: dict[tuple[str | int, ...], list[Tensor]] = {}
    for tensor in tensors(config, merged_experts=True):
        places.setdefault(tensor.path, []).append(tensor)
    return places


def _checked_paths(params: Any, config: ModelConfig) -> list[tuple[list[Tensor], Any]]:
    places, given = _by_path(config), list(_paths(params))
    if differ := set(places) ^ {path for path, _ in given}:
        names = sorted("/".join(map(str, path)) for path in differ)
        raise UserError(f"these are not the parameters of the config: {_shortened(names)}")
    out = []
    for path, leaf in given:
        here = places[path]
        shape = (config.num_periods,) * len(here[0].index) + here[0].shape
        if tuple(leaf.shape) != shape:
            raise UserError(
                f"parameter {'/'.join(map(str, path))} is {list(leaf.shape)}, the config says {list(shape)}"
            )
        out.append((here, leaf))
    return out


def _unstacked(params: Any, config: ModelConfig) -> dict[str, Any]:
    out = {}
    for here, leaf in _checked_paths(params, config):
        if not here[0].index:
            out[here[0].name] = _global(leaf)
            continue
        slices = _slicer(_layer_sharding(leaf))(leaf) if isinstance(leaf, jax.Array) else tuple(leaf)
        out |= {tensor.name: _global(x) for tensor, x in zip(here, slices)}
    return out


def _layer_sharding(leaf: Any) -> Any:
    """The sharding of one layer's slice of a leaf stacked over periods; None where the leaf has none of its own."""
    sharding = _sharding(leaf)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    if sharding is not None and len(sharding.device_set) > 1:
        raise ValueError(f"parameters must have NamedShardings, not {sharding}")
    return sharding


@functools.lru_cache(maxsize=64)
def _slicer(sharding: Any) -> Any:
    return jax.jit(lambda x: tuple(x[i] for i in range(x.shape[0])), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _stacker(sharding: Any) -> Any:
    return jax.jit(lambda xs: jnp.stack(xs), out_shardings=sharding)


def _per_layer_targets(params: Any, config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    out = {}
    for here, leaf in _checked_paths(params, config):
        sharding = _layer_sharding(leaf) if here[0].index else _sharding(leaf)
        out |= {t.name: jax.ShapeDtypeStruct(t.shape, leaf.dtype, sharding=sharding) for t in here}
    return out


def _stacked(params: Any, read: dict[str, Any], config: ModelConfig) -> Any:
    out = []
    for here, leaf in _checked_paths(params, config):
        values = [read.pop(tensor.name) for tensor in here]
        if not here[0].index:
            value = values[0]
        elif isinstance(values[0], jax.Array):
            value = _stacker(_sharding(leaf))(values)
        else:
            value = np.stack(values)
        out.append(value if isinstance(leaf, np.ndarray) else jnp.asarray(value))
    return jax.tree.unflatten(jax.tree.structure(params), out)


def _compare(info: Info, what: str, there: dict[str, list[Any]], here: dict[str, Any]) -> None:
    differ = [f"{name} is only there" for name in there if name not in here]
    differ += [f"{name} is only here" for name in here if name not in there]
    for name, (_, shape) in there.items():
        if name in here and list(here[name].shape) != shape:
            differ.append(f"{name} is {shape} there, {list(here[name].shape)} here")
    if differ:
        raise UserError(f"{info.path} holds other {what} than this run: {_shortened(differ)}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if not isinstance(name, str) or "/" in name:
            raise ValueError(f"arrays: {name!r} is no name (a string without '/')")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


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


def _jsonable(config: ModelConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


# ---------------------------------------------------------------------------------------------- files and processes


def _context() -> Any:
    import orbax.checkpoint.experimental.v1 as ocp

    def chunks(key: Any, value: Any) -> Any:
        # Rows before columns: a converter and another mesh then read a part without reading all of it.
        if value.nbytes <= CHUNK_BYTES:
            return None
        return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,))

    logging.getLogger("absl").addFilter(_reported_by_us)
    context = ocp.Context()
    context.array_options.saving.use_compression = False  # trained weights do not shrink; zstd halves the speed
    context.array_options.saving.scoped_storage_options_creator = chunks
    return context


def _reported_by_us(record: logging.LogRecord) -> bool:
    """Keeps out the tracebacks that Orbax logs from its threads: the same error comes out of ``save`` or ``wait``."""
    return not (record.levelno >= logging.ERROR and "orbax" in Path(record.pathname).parts)


def _checksums(paths: list[Path]) -> list[int]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(crc32, paths))


def crc32(path: Path) -> int:
    """CRC-32 of a file's contents."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _await(condition: Any, what: str) -> None:
    deadline = time.monotonic() + OTHERS_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"waited {OTHERS_TIMEOUT} s for {what}; is it alive, and is the directory shared?")
        time.sleep(0.02)


def _from_first_process(steps: list[int]) -> list[int]:
    """The same list everywhere: a checkpoint may appear between two processes' looking."""
    if jax.process_count() == 1:
        return steps
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.resize(np.array([*steps, 0], np.int32), length) if length else np.zeros(0, np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(mine)] if length else []


def _from_all(value: int) -> list[int]:
    from jax.experimental import multihost_utils

    return [int(x) for x in np.ravel(multihost_utils.process_allgather(np.int32(value)))]


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _shortened(lines: list[str]) -> str:
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
