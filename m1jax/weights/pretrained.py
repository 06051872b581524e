"""A model from a directory of Hugging Face files, and back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from m1jax import processes
from m1jax.chat import Tokenizer
from m1jax.config import Layout
from m1jax.disk import writing
from m1jax.errors import UserError, shortened
from m1jax.model import MiniMaxM1
from m1jax.model.transformer import default_dtype
from m1jax.sharding import check_shardable, parameter_shardings
from m1jax.weights.directory import CONFIG, copy_companions, name_end_token, new_directory, read_config
from m1jax.weights.names import Tensor, by_path, tensors, tree_path
from m1jax.weights.safetensors import Plan, Weights, Writer, cast, compare, finite


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
    weights: Weights, here: Sequence[Tensor], leaf: Any, sharding: Any, pool: ThreadPoolExecutor, not_finite: list[str]
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
    tokenizer: Tokenizer | None = None,
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
        tokenizer: written along, with a generation_config.json that names the end token.
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
        failure = None
        if processes.writes():
            try:
                partial = stack.enter_context(new_directory(Path(directory)))
                writer = stack.enter_context(Writer(partial, plan))
            except UserError as error:
                failure = error
        processes.raise_together(failure, f"{directory}: process 0 could not begin to write; see there")
        for path, parts in by_path(config).items():
            slices: dict[tuple[int, ...], list[Tensor]] = {}
            for tensor in parts:
                slices.setdefault(tensor.index[:1], []).append(tensor)
            for first, members in slices.items():
                layer = processes.on_host(parameters[path][first])
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
            with writing(partial / CONFIG):
                (partial / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
                if tokenizer_from is not None:
                    copy_companions(Path(tokenizer_from), partial)
                if tokenizer is not None:
                    tokenizer.save(partial)
                name_end_token(partial)
