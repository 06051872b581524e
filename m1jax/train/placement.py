"""Where a training's arrays lie: on the ambient mesh (``jax.set_mesh``), or without one on the default device.

Every process holds its share of parameters and optimizer state, reads its share of each batch, and computes the same
statistics; process 0 alone writes logs, samples and exports.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from m1jax.config import ModelConfig
from m1jax.errors import UserError
from m1jax.model import MiniMaxM1
from m1jax.sharding import AXES, ROWS, check_shardable, make_mesh, parameter_shardings, process_rows, rows_of_batch
from m1jax.train.batch import B
from m1jax.train.step import TrainState, init_state
from m1jax.weights.directory import read_config
from m1jax.weights.pretrained import from_pretrained


def use_mesh(spec: str, devices: Sequence[Any] | None = None) -> contextlib.AbstractContextManager[Any]:
    """`with use_mesh("fsdp=4,tensor=2"):` trains on that mesh, of these devices or all; an empty spec means one device.

    Raises:
        UserError: what `make_mesh` raises, or several processes without a spec.
    """
    if spec:
        # As many as NCCL knows: between two H200 an update with fsdp=2 takes 203 instead of 212 ms.
        os.environ.setdefault("NCCL_MIN_NCHANNELS", "32")
        return jax.set_mesh(make_mesh(spec, devices))
    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes with {jax.device_count()} devices need a mesh: give --mesh fsdp=-1, or "
            f"any sizes of {', '.join(AXES)} whose product is {jax.device_count()}"
        )
    return contextlib.nullcontext()


def current_mesh() -> Mesh | None:
    """The mesh of `use_mesh`."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def load_model(directory: str | os.PathLike[str], shapes: Iterable[tuple[int, int]]) -> MiniMaxM1:
    """The model in a directory, ready to be trained: float32 master weights on the mesh, the platform's compute dtype.

    Args:
        directory: as for `from_pretrained`.
        shapes: (rows, time) of the micro-batches that will come.

    Raises:
        UserError: before any weight is read, if rows are longer than the model's positions, or the mesh cannot shard
            the model or these batches; or what `from_pretrained` raises.
    """
    config = read_config(Path(directory))
    check_rows(config, shapes)
    return from_pretrained(directory, param_dtype=jnp.float32, mesh=current_mesh())


def check_rows(config: ModelConfig, shapes: Iterable[tuple[int, int]]) -> None:
    """Whether a model and the mesh take micro-batches of so many (rows, time).

    Raises:
        UserError: rows are longer than the model's positions, or the mesh cannot shard the model or these batches.
    """
    mesh, shapes = current_mesh(), list(shapes)
    longest = max(time for _, time in shapes)
    if longest > config.max_position_embeddings:
        raise UserError(
            f"rows of {longest} tokens are longer than the model's max_position_embeddings = "
            f"{config.max_position_embeddings}: make them shorter"
        )
    if mesh is not None:
        for rows, time in shapes:
            check_shardable(config, mesh, batch=rows, time=time)


def place_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of a training that begins with these parameters, on the mesh."""
    mesh = current_mesh()
    if mesh is None:
        return init_state(params, optimizer)
    if jax.process_count() > 1:  # an array of this process alone must become one that all share
        params = jax.tree.map(lambda x: np.asarray(x) if x.is_fully_addressable else x, params)
    params = jax.device_put(params, parameter_shardings(params, mesh))
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer)._replace(params=()), params)
    rest = jax.jit(
        lambda p: init_state(p, optimizer)._replace(params=()), out_shardings=parameter_shardings(shapes, mesh)
    )(params)
    return rest._replace(params=params)


def share_of_rows() -> tuple[int, int]:
    """(which, of how many): the share of every batch's rows that this process reads. Processes whose devices hold the
    same rows have the same share."""
    mesh = current_mesh()
    if mesh is None:
        return 0, 1
    everything = int(np.prod([mesh.shape[axis] for axis in ROWS]))
    mine = process_rows(everything, mesh)
    return mine.start // len(mine), everything // len(mine)


def own_share(batch: B) -> B:
    """This process's share of the rows of a batch that all processes know whole, fields [count, rows, time]."""
    share, shares = share_of_rows()
    return batch.map(lambda x: x[:, share * x.shape[1] // shares : (share + 1) * x.shape[1] // shares])


def place_batch(local: B) -> B:
    """A batch from this process's share of its rows, fields [count, its rows, time]."""
    mesh = current_mesh()
    if mesh is None:
        return local
    rows = local.tokens.shape[1] * share_of_rows()[1]
    return dataclasses.replace(local, **rows_of_batch(local.fields(), rows, mesh))
