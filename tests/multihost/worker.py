"""One process of a job: trains a small model, reading only its share of the data, and says what came out.

    worker.py DIRECTORY LOSS MESH STEPS [SECONDS]

LOSS is sft or rl; each update takes at least SECONDS, so that somebody can kill it.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from m1jax.checkpoint import Checkpoints
from m1jax.config import ModelConfig
from m1jax.model import MiniMaxM1
from m1jax.rl.trainer import rl_loss
from m1jax.rl.types import RLBatch, stacked
from m1jax.sharding import make_mesh, parameter_shardings, process_rows, rows_of_batch
from m1jax.train import guards
from m1jax.train.loop import supervised_loss
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.step import init_state, make_train_step

ROWS, LENGTH = 4, 16
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=8,
    layer_types=("lightning", "softmax"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_experts=4,
    experts_per_token=2,  # of one alone the weight is always 1: its router would train on rounding errors
    initializer_range=0.2,
)


def row(step: int, number: int) -> RLBatch:
    """One row of an update's batch: a pure function, so that no process needs the rows of another."""
    rng = np.random.default_rng([step, number])
    return RLBatch(
        tokens=rng.integers(0, CONFIG.vocab_size, LENGTH).astype(np.int32),
        targets=rng.integers(0, CONFIG.vocab_size, LENGTH).astype(np.int32),
        segment_ids=np.sort(rng.integers(0, 2, LENGTH)).astype(np.int32),
        mask=np.ones(LENGTH, bool),
        weight=np.full(LENGTH, 1 / (ROWS * LENGTH), np.float32),
        advantage=rng.normal(size=LENGTH).astype(np.float32),
        old_logp=rng.normal(-3.0, 0.1, LENGTH).astype(np.float32),
    )


def main(directory: Path, kind: str, spec: str, steps: int, seconds: float = 0.0) -> None:
    mesh = make_mesh(spec)
    optimizer = OptimizerConfig(learning_rate=1e-2, eps=1e-8).build(steps)
    graph, params = nnx.split(MiniMaxM1(CONFIG, rngs=nnx.Rngs(0)))
    loss = supervised_loss(graph, 0.01) if kind == "sft" else rl_loss(graph, max_weight=5.0)
    with (
        jax.set_mesh(mesh),
        Checkpoints(directory / "checkpoints", config=CONFIG, keep=2) as checkpoints,
        guards.StopRequests() as stop,
    ):
        shapes = jax.eval_shape(lambda p: init_state(p, optimizer), params)
        placed = jax.jit(lambda p: init_state(p, optimizer), out_shardings=parameter_shardings(shapes, mesh))
        state = placed(jax.tree.map(np.asarray, params))
        found = checkpoints.restore(params=state.params, state=state._replace(params=()))
        start = 0
        if found is not None:
            start, state = found.step, found.state._replace(params=found.params)
        step_fn = make_train_step(loss, optimizer)
        mine = process_rows(ROWS, mesh)
        losses = []
        for step in range(start + 1, steps + 1):
            begun = time.monotonic()
            rows = [row(step, number) for number in mine]
            local = stacked(rows).map(lambda x: x[None])
            batch = RLBatch(**rows_of_batch(local.fields(), ROWS, mesh))
            state, report = step_fn(state, batch, count=1)
            losses.append(float(report.loss))
            print(f"update {step} loss {losses[-1]:.6f}", flush=True)
            time.sleep(max(0.0, begun + seconds - time.monotonic()))
            leaving = stop.requested()
            if leaving or step % 2 == 0 or step == steps:
                checkpoints.save(step, params=state.params, state=state._replace(params=()), meta={})
            if leaving:
                checkpoints.wait()
                print(f"saved update {step}, leaving as asked", flush=True)
                return
    norms = jax.jit(lambda p: [jax.numpy.linalg.norm(x) for x in jax.tree.leaves(p)])(state.params)
    result = {"start": start, "losses": losses, "norms": [float(x) for x in norms], "rows": list(mine)}
    (directory / f"result-{jax.process_index()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    folder, kind, spec, steps, *seconds = sys.argv[1:]
    main(Path(folder), kind, spec, int(steps), *map(float, seconds))
