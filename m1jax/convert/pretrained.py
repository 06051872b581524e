"""A model from a directory of Hugging Face files, and back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from m1jax.config import Layout, ModelConfig
from m1jax.convert.files import (
    INDEX,
    Plan,
    Weights,
    Writer,
    cast,
    compare,
    finite,
    full_disk,
    read_json,
    shortened,
    unmerged,
)
from m1jax.convert.names import Tensor, tensors, transformers_merged
from m1jax.errors import UserError
from m1jax.model import MiniMaxM1
from m1jax.model.transformer import default_dtype
from m1jax.sharding import check_shardable, parameter_shardings

CONFIG = "config.json"
# What belongs to the tokenizer and to generation, copied from one directory to another as it is.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def from_pretrained(
    directory: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike | None = None,
    mesh: Mesh | None = None,
    *,
    param_dtype: jax.typing.DTypeLike | None = None,
) -> MiniMaxM1:
    """The model in a directory of the authors' layout or of Transformers' ``minimax``.

    Args:
        directory: config.json and safetensors files, one or many with an index.
        dtype: of parameters and computation; None takes float32 on CPU and bfloat16 on GPU and TPU. Routers are
            float32 whatever it is.
        mesh: where to put the parameters (``m1jax.sharding.make_mesh``); each process reads what its devices need and
            nothing else. None: the default device.
        param_dtype: of the parameters alone, where they should be more precise than the computation (training).

    Raises:
        UserError: the directory is no model of this kind, a file is missing, truncated or damaged, tensors are
            missing, unknown or of the wrong shape, or a weight is not a finite number.
    """
    directory = Path(directory)
    config = read_config(directory)
    weights = Weights(directory)
    compare(
        directory, {name: e.shape for name, e in weights.entries.items()}, {t.name: t.shape for t in tensors(config)}
    )
    dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
    if mesh is not None:
        check_shardable(config, mesh)

    stored = dtype if param_dtype is None else param_dtype
    abstract = nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=stored))
    graph, state = nnx.split(abstract)
    shardings = None if mesh is None else parameter_shardings(state, mesh)
    places = by_path(config)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    targets = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    not_finite: list[str] = []
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        loaded = [
            _load(weights, places[tree_path(path)], leaf, sharding, pool, not_finite)
            for (path, leaf), sharding in zip(leaves, targets)
        ]
    if not_finite:
        raise UserError(f"{directory}: NaN or infinity in {shortened(sorted(set(not_finite)))}; the file is damaged")
    return nnx.merge(graph, jax.tree.unflatten(structure, loaded))


def _load(
    weights: Weights, here: list[Tensor], leaf: Any, sharding: Any, pool: ThreadPoolExecutor, not_finite: list[str]
) -> jax.Array:
    """One leaf of our tree from the tensors that fill it, directly in its sharding."""
    pieces = {tensor.index: tensor.name for tensor in here}

    def fill(out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        values = weights.array(name)[index]
        out[...] = values
        if not np.isfinite(out.astype(np.float32, copy=False).sum(dtype=np.float32)) and not np.isfinite(out).all():
            not_finite.append(name)

    cached: dict[tuple, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
        if bounds not in cached:
            out = np.empty([stop - start for start, stop in bounds], leaf.dtype)
            depth = len(here[0].index)
            rest = tuple(slice(*b) for b in bounds[depth:])
            jobs = []
            for place in np.ndindex(*out.shape[:depth]):
                name = pieces[tuple(p + start for p, (start, _) in zip(place, bounds))]
                jobs.append(pool.submit(fill, out[place], name, rest))
            for job in jobs:
                job.result()
            cached.clear()  # devices that repeat a shard come one after the other; do not keep more than one
            cached[bounds] = out
        return cached[bounds]

    if sharding is None:
        return jnp.asarray(read(tuple(slice(None) for _ in leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, read, dtype=leaf.dtype)


def save_pretrained(
    model: MiniMaxM1,
    directory: str | os.PathLike[str],
    layout: Layout = "official",
    dtype: jax.typing.DTypeLike | None = None,
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model as Hugging Face files that the authors' code or Transformers (``layout``) loads.

    The directory appears complete or not at all. An earlier export of the same name, with nothing beside the files of
    a model, is replaced; any other directory that is not empty is refused.

    Args:
        model: on one device or sharded; with several processes all must call, and process 0 writes.
        directory: where to.
        layout: "official" or "transformers" (same tensors, another config.json).
        dtype: of the files; None keeps the parameters'. Routers are float32 whatever it is.
        tokenizer_from: a directory whose tokenizer files are copied along.

    Raises:
        UserError: Transformers has no such model (shared expert), a value is too large for the dtype, the disk is full,
            or the directory is in use.
    """
    config = model.config
    values = config.to_hf(layout)
    parameters = {tree_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.split(model)[1])[0]}
    stored = {path: np.dtype(leaf.dtype if dtype is None else dtype) for path, leaf in parameters.items()}
    plan = Plan((t.name, t.shape, np.dtype(np.float32) if t.router else stored[t.path]) for t in tensors(config))
    values["torch_dtype" if layout == "official" else "dtype"] = str(stored["embed_tokens",])
    with contextlib.ExitStack() as stack:
        partial = writer = None
        if jax.process_index() == 0:
            partial = stack.enter_context(new_directory(Path(directory)))
            writer = stack.enter_context(Writer(partial, plan))
        for path, parts in by_path(config).items():
            slices: dict[tuple[int, ...], list[Tensor]] = {}
            for tensor in parts:
                slices.setdefault(tensor.index[:1], []).append(tensor)
            for first, members in slices.items():
                layer = _to_host(parameters[path][first])
                for tensor in members if writer else ():
                    assert writer is not None
                    to = plan.entries[tensor.name].dtype
                    here = layer[tensor.index[1:]]
                    out = cast(here, to)
                    if here.dtype != to and finite(here) and not finite(out):
                        raise UserError(
                            f"values in {tensor.name} are too large for {to}; save it as bfloat16 or float32"
                        )
                    writer.write(tensor.name, out)
        if writer is not None and partial is not None:
            writer.finish()
            (partial / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
            if tokenizer_from is not None:
                copy_companions(Path(tokenizer_from), partial)


def _to_host(x: jax.Array) -> np.ndarray:
    """One layer's slice in this process's memory, whatever devices it lies on."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


# ------------------------------------------------------------------------------------------------ shared by conversion


def read_config(directory: Path) -> ModelConfig:
    """The config of a directory of Hugging Face files; UserError names the file where something is wrong."""
    values = read_json(directory / CONFIG)
    try:
        return ModelConfig.from_hf(values)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error


def open_weights(directory: Path, config: ModelConfig) -> Weights:
    """The official tensors of a directory, all there with the shapes of the config, or a UserError."""
    weights = Weights(directory)
    weights.entries = unmerged(weights.entries, transformers_merged(config))
    expected = {tensor.name: tensor.shape for tensor in tensors(config)}
    compare(directory, {name: entry.shape for name, entry in weights.entries.items()}, expected)
    weights.entries = {name: weights.entries[name] for name in expected}
    return weights


def by_path(config: ModelConfig) -> dict[tuple[str | int, ...], list[Tensor]]:
    """The tensors that fill each parameter of our tree."""
    places: dict[tuple[str | int, ...], list[Tensor]] = {}
    for tensor in tensors(config):
        places.setdefault(tensor.path, []).append(tensor)
    return places


def tree_path(path: Any) -> tuple[str | int, ...]:
    """A path of ``jax.tree_util`` as the table of names has it: ("layers", 0, "moe", "w1")."""
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer's files that are there."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A sibling to write into, renamed to ``directory`` at the end; removed if that is not reached."""
    directory = directory.resolve()
    check_replaceable(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial.parent}: cannot be written ({error.strerror})") from error
    try:
        yield partial
        put_in_place(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_replaceable(directory: Path) -> None:
    """Raises UserError where writing to ``directory`` would remove something that is no export of a model."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give the name of a new directory")
    if directory.is_mount():  # cannot be renamed
        raise UserError(f"{directory} is where a disk is mounted; give the name of a new directory on it")
    there = list(directory.iterdir()) if directory.is_dir() else []
    if not there:
        return
    others = sorted(path.name for path in there if not _is_exported(path))
    try:
        read_config(directory)
    except UserError:  # a run has a config.json too, and so has any other model
        others = others or [CONFIG]
    if others:
        raise UserError(
            f"{directory} holds something else than a model's export ({others[0]}); give the name of a new directory"
        )


def _is_exported(path: Path) -> bool:
    return path.is_file() and (path.name in (CONFIG, INDEX, *COMPANIONS) or path.suffix == ".safetensors")


def put_in_place(partial: Path, directory: Path) -> None:
    """Renames a complete directory to its name; what has that name now goes away afterwards."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    try:
        if directory.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            directory.rename(replaced)
        partial.rename(directory)
    except OSError as error:
        raise full_disk(error, directory, 0) from error
    shutil.rmtree(replaced, ignore_errors=True)
