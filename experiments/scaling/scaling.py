"""Does training scale over the GPUs of one host? An update on meshes of one, two and more cards, beside one card's.

    python -m experiments.scaling.scaling --preset m1-2b --rows 8 --tokens 4096 --meshes data=2 fsdp=2 expert=2 tensor=2
    python -m experiments.scaling.scaling --preset m1-2b --rows 1 --tokens 32768 --meshes sequence=2

Weak scaling: every card has `rows` x `tokens` of its own (under tensor and sequence, a mesh has as many rows as its
cards together would have). Each case is a process; they compile at the same time and are timed one after another. All
meshes of as many cards train on the same rows: loss and gradient norm of the first update, which go to --out with the
rest, must be the same.
"""

import argparse
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOCK = "M1JAX_SCALING_LOCK"
SEQUENCES = 4  # packed into a row
UPDATES = 8


def wait_for_turn() -> None:
    """Until no other case is timed; the turn, and with it the cards' memory, is kept until this process ends."""
    file = os.open(os.environ[LOCK], os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)


def case(preset: str, rows: int, tokens: int, mesh: str) -> dict[str, Any]:
    """One mesh: seconds of an update, its loss, what it communicates."""
    import jax
    import numpy as np
    from flax import nnx

    from m1jax import MiniMaxM1, ModelConfig, sharding
    from m1jax.collectives import collectives
    from m1jax.flops import peak_flops, training_flops
    from m1jax.train.batch import Batch
    from m1jax.train.loop import supervised_loss
    from m1jax.train.optimizer import OptimizerConfig
    from m1jax.train.placement import place_batch, use_mesh
    from m1jax.train.step import init_state, make_train_step

    config = ModelConfig.preset(preset)
    cards = cards_of(mesh)
    optimizer = OptimizerConfig(learning_rate=1e-4).build(1000)

    with use_mesh(mesh):

        def begin() -> Any:
            return init_state(nnx.split(MiniMaxM1(config, rngs=nnx.Rngs(0)))[1], optimizer)

        graph, _ = nnx.split(nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0))))
        shapes = jax.eval_shape(begin)
        placed = sharding.parameter_shardings(shapes, jax.sharding.get_mesh()) if mesh else None
        step = make_train_step(supervised_loss(graph, config.router_aux_loss_coef), optimizer)
        shape = (1, rows * cards, tokens)
        rng = np.random.default_rng(0)
        words = [rng.integers(0, config.vocab_size, shape).astype(np.int32) for _ in range(2)]
        segments = np.broadcast_to(np.arange(tokens) * SEQUENCES // tokens, shape).astype(np.int32)
        weight = np.full(shape, 1 / np.prod(shape), np.float32)
        batch = place_batch(
            Batch.of(tokens=words[0], targets=words[1], segment_ids=segments, mask=np.ones(shape, bool), weight=weight)
        )
        start = time.perf_counter()
        described = (
            shapes
            if placed is None
            else jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
        )
        compiled = step.lower(described, batch).compile()
        compiling = time.perf_counter() - start
        moved: dict[str, float] = {}
        for one in collectives(compiled):
            moved[one.kind] = moved.get(one.kind, 0.0) + one.bytes / 1e9
        wait_for_turn()
        state = jax.jit(begin, out_shardings=placed)()
        times, first = [], None
        for _ in range(UPDATES):
            start = time.perf_counter()
            state, report = compiled(state, batch)
            jax.block_until_ready(report)
            times.append(time.perf_counter() - start)
            first = first or jax.device_get(report)
    assert first is not None
    seconds = statistics.median(times[1:])
    cut = tokens // SEQUENCES
    flops = training_flops(config, math.prod(shape), rows * cards * SEQUENCES * cut * (cut + 1) / 2)
    peak = peak_flops(jax.devices()[0].device_kind) or float("nan")
    return {
        "cards": cards,
        "ms": seconds * 1e3,
        "tokens/s": math.prod(shape) / seconds,
        "MFU %": 100 * flops / seconds / peak / cards,
        "loss": float(first.loss),
        "gradient norm": float(first.grad_norm),
        "compile s": compiling,
        "GB a card communicates": moved,
        "device": jax.devices()[0].device_kind,
    }


def cards_of(mesh: str) -> int:
    return math.prod(int(part.partition("=")[2]) for part in mesh.split(",")) if mesh else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="m1-2b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--meshes", nargs="+", default=["data=2", "fsdp=2", "expert=2", "tensor=2"])
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case is not None:
        print(json.dumps(case(chosen.preset, chosen.rows, chosen.tokens, chosen.case)), flush=True)
        return
    lock = Path(os.environ.get(LOCK) or chosen.out.with_suffix(".lock"))  # several runs may share one
    processes = {}
    for mesh in ["", *chosen.meshes]:
        visible = ",".join(map(str, range(cards_of(mesh))))
        environment = os.environ | {
            LOCK: str(lock), "CUDA_VISIBLE_DEVICES": visible, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"
        }  # fmt: skip
        same = ["--preset", chosen.preset, "--rows", str(chosen.rows), "--tokens", str(chosen.tokens)]
        command = [sys.executable, "-m", "experiments.scaling.scaling", *same, "--case", mesh]
        processes[mesh] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    found = {}
    with ThreadPoolExecutor(len(processes)) as pool:
        answers = {pool.submit(process.communicate): mesh for mesh, process in processes.items()}
        for answer in as_completed(answers):
            mesh, lines = answers[answer] or "one card", answer.result()[0].splitlines()
            found[mesh] = json.loads(lines[-1]) if processes[answers[answer]].returncode == 0 else None
            print(mesh, lines[-1] if lines else "failed", flush=True)
    lock.unlink(missing_ok=True)
    one = found["one card"]
    for name, row in found.items():
        if row is None:
            print(f"{name:14} failed", flush=True)
            continue
        row["times one card"] = row["tokens/s"] / one["tokens/s"] if one else None
        shown = {k: f"{v:.4g}" for k, v in row.items() if isinstance(v, int | float)}
        print(f"{name:14}", *(f"{k} {v}" for k, v in shown.items()), flush=True)
    chosen.out.write_text(
        json.dumps({"preset": chosen.preset, "rows": chosen.rows, "tokens": chosen.tokens, "cases": found}, indent=1)
    )


if __name__ == "__main__":
    main()
