"""Does the RL step of the 456 B model compile for a pod that is not here, and what would it take?

    python -m experiments.compile_456b.compile                      # M1 on 512 chips of a v5p pod slice
    python -m experiments.compile_456b.compile --topology v5p:2x2x1 --mesh fsdp=2,tensor=2 --preset m1-100m --time 2048

Compiles forward, backward and AdamW of one CISPO update with the compiler for TPUs (`libtpu`); nothing is allocated.
Writes the table of `README.md` beside this file to standard output.
"""

import dataclasses
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a cloud's metadata server for its chips

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m1jax.collectives import Collective, collectives, totals
from m1jax.config import ModelConfig
from m1jax.model import MiniMaxM1
from m1jax.rl.trainer import rl_loss
from m1jax.sharding import ROWS, check_shardable, make_mesh, parameter_shardings
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.step import init_state, make_train_step

# The fields of a micro-batch, [1, rows, time] each (`m1jax.rl.rollout.build_updates`).
BATCH = dict.fromkeys(("tokens", "targets", "segment_ids"), jnp.int32)
BATCH |= dict.fromkeys(("advantage", "old_logp", "weight"), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compile one RL update for TPUs that are not here."""

    preset: str = "m1-456b"
    topology: str = "v5p:8x8x8"
    """chip and slice, as libtpu names them"""
    mesh: str = "fsdp=16,expert=8,tensor=4"
    rows: int = 128
    """rows of a micro-batch, over all devices"""
    time: int = 32_768
    """tokens per row"""


def compile_update(config: ModelConfig, mesh: Mesh, *, rows: int, length: int, dtype: Any = jnp.bfloat16) -> Any:
    """The compiled update: CISPO loss, gradients and AdamW, every layer rematerialised; float32 master weights."""
    check_shardable(config, mesh, batch=rows, time=length)
    optimizer = OptimizerConfig(learning_rate=1e-6).build(1000)
    model = nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, params = nnx.split(model)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, parameter_shardings(state, mesh)
    )
    tokens = NamedSharding(mesh, PartitionSpec(None, ROWS, "sequence"))
    batch = {name: jax.ShapeDtypeStruct((1, rows, length), kind, sharding=tokens) for name, kind in BATCH.items()}
    step = make_train_step(rl_loss(graph, max_weight=5.0, remat=True), optimizer)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def tpu_mesh(topology: str, spec: str) -> Mesh:
    """A mesh of chips that are not here. Raises RuntimeError where libtpu is missing or does not know the topology."""
    return make_mesh(spec, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def report(listed: list[Collective], memory: Any, seconds: float) -> str:
    """A Markdown table of bytes per device and of collectives per micro-batch."""
    gb = 1e9
    lines = [
        f"compiled in {seconds:.0f} s",
        "",
        "| per device | GB |",
        "|---|---|",
        f"| parameters, optimizer, batch | {memory.argument_size_in_bytes / gb:.2f} |",
        f"| gradients, activations, gathered weights | {memory.temp_size_in_bytes / gb:.2f} |",
        f"| results elsewhere | {(memory.output_size_in_bytes - memory.alias_size_in_bytes) / gb:.2f} |",
        f"| program | {memory.generated_code_size_in_bytes / gb:.2f} |",
        "",
        "| collective | runs | GB |",
        "|---|---|---|",
        *(f"| {kind} | {count} | {size / gb:.2f} |" for kind, (count, size) in totals(listed).items()),
        "",
        "| largest | array | devices | runs | GB |",
        "|---|---|---|---|---|",
        *(f"| {c.kind} | {c.shape} | {c.devices} | {c.count} | {c.bytes / gb:.2f} |" for c in listed[:16]),
    ]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Prints the report."""
    mesh = tpu_mesh(config.topology, config.mesh)
    start = time.monotonic()
    compiled = compile_update(ModelConfig.preset(config.preset), mesh, rows=config.rows, length=config.time)
    seconds = time.monotonic() - start
    print(f"{config.preset}, {config.rows} rows of {config.time} tokens on {config.topology}, {config.mesh}:")
    print(report(collectives(compiled), compiled.memory_analysis(), seconds))


if __name__ == "__main__":
    main(tyro.cli(Config))
