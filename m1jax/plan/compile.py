"""The real step, compiled for TPUs that are not here (`libtpu`, no chip): what the compiler says it needs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m1jax.config import ModelConfig
from m1jax.errors import UserError
from m1jax.model import Cache, MiniMaxM1
from m1jax.plan.setup import Setup
from m1jax.rl.conventions import CONVENTIONS
from m1jax.rl.trainer import rl_loss
from m1jax.rl.types import RLBatch
from m1jax.sharding import ROWS, make_mesh, parameter_shardings
from m1jax.train.batch import Batch
from m1jax.train.loop import supervised_loss
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.step import init_state, make_train_step

DTYPE = jnp.bfloat16


def tpu_mesh(topology: str, spec: str) -> Mesh:
    """A mesh of chips that are not here; `topology` as libtpu names it, for example "v5p:2x2x1".

    Raises:
        UserError: libtpu is missing.
        RuntimeError: libtpu does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPU needs libtpu: `make kernels-toolchain`, or pip install -e '.[kernels]'")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a cloud's metadata server for its chips
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the chips themselves
    return make_mesh(spec, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_step(setup: Setup, mesh: Mesh) -> Any:
    """The compiled step of a set-up: an update of a training task, or a piece of generation."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return (_generation if setup.task == "generate" else _update)(setup, mesh).compile()


def required_bytes(program: Any) -> float:
    """What a compiled program takes on each device at its peak, its own code included.

    Not the sum of `argument_size` and `temp_size`: the compiler refuses a program by its peak.
    """
    found = program.memory_analysis()
    return found.peak_memory_in_bytes + found.generated_code_size_in_bytes


def _update(setup: Setup, mesh: Mesh) -> Any:
    """Loss, gradients and AdamW of one micro-batch; float32 master weights, bfloat16 compute."""
    optimizer = OptimizerConfig(learning_rate=1e-6).build(1000)
    graph, params = _model(setup.model, jnp.float32)
    state = _placed(jax.eval_shape(lambda p: init_state(p, optimizer), params), mesh)
    tokens = NamedSharding(mesh, PartitionSpec(None, ROWS, "sequence"))
    kind = RLBatch if setup.task == "rl" else Batch
    batch = kind.shapes((setup.micro_batches, setup.rows, setup.context))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=tokens), batch)
    if setup.task == "rl":
        loss = rl_loss(graph, CONVENTIONS["paper"].objective, remat=setup.remat)
    else:
        loss = supervised_loss(graph, setup.model.router_aux_loss_coef, setup.remat)
    return make_train_step(loss, optimizer).lower(state, batch, count=jax.ShapeDtypeStruct((), jnp.int32))


def _generation(setup: Setup, mesh: Mesh) -> Any:
    """`piece` tokens of every row into the cache, and the logits of the last; bfloat16 parameters."""
    graph, params = _model(setup.model, DTYPE, whole=True)
    rows = ROWS if setup.rows_are_cut else None
    cache = jax.eval_shape(lambda: Cache.empty(setup.model, setup.rows, setup.context, DTYPE))

    cache = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        cache,
        cache.specs(rows),
    )
    shape = (setup.rows, setup.piece)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(rows)))

    def step(params: Any, cache: Cache, tokens: jax.Array) -> Any:
        return nnx.merge(graph, params)(tokens, cache, last_only=True)

    return jax.jit(step, donate_argnums=1).lower(_placed(params, mesh, whole=True), cache, tokens)


def _model(config: ModelConfig, param_dtype: Any, whole: bool = False) -> tuple[Any, Any]:
    model = nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0), dtype=DTYPE, param_dtype=param_dtype))
    model.whole = whole
    return nnx.split(model)


def _placed(tree: Any, mesh: Mesh, whole: bool = False) -> Any:
    places = parameter_shardings(tree, mesh, whole=whole)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)
