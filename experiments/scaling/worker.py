"""One case in a process of its own (or several, which `m1jax launch` starts): compiled, then timed when told to.

    python -m experiments.scaling.worker FOLDER NAME [--compile]

Reads the case from `NAME.case` in the folder, says `NAME.0.ready` there when it has compiled (0: the process), waits
for `NAME.go`, leaves `NAME.json`, and what ran on the cards in `NAME.kernels.txt`. With --compile it ends when it has
compiled: the next process finds the program in JAX's cache.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.scaling.cases import Case


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    case = Case(**json.loads(folder.joinpath(f"{name}.case").read_text()))
    measure(case, folder, compile_only="--compile" in sys.argv)


def measure(case: Case, folder: Path, compile_only: bool) -> None:
    import jax
    import numpy as np
    from flax import nnx

    from m1jax import MiniMaxM1
    from m1jax.collectives import collectives, totals
    from m1jax.flops import peak_flops, training_flops
    from m1jax.sharding import parameter_shardings
    from m1jax.train.batch import Batch
    from m1jax.train.loop import supervised_loss
    from m1jax.train.optimizer import OptimizerConfig
    from m1jax.train.placement import current_mesh, own_share, place_batch, use_mesh
    from m1jax.train.step import init_state, make_train_step

    began = time.perf_counter()
    config, optimizer = case.config, OptimizerConfig(learning_rate=1e-4).build(1000)

    def begin() -> Any:
        return init_state(nnx.split(MiniMaxM1(config, rngs=nnx.Rngs(0)))[1], optimizer)

    with use_mesh(case.mesh):
        mesh = current_mesh()
        graph, _ = nnx.split(nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0))))
        described = jax.eval_shape(begin)
        placed = None
        if mesh is not None:
            placed = parameter_shardings(described, mesh)
            described = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), described, placed)
        batch = rows(case, config.vocab_size, np, Batch)
        batch = jax.device_put(batch) if mesh is None else place_batch(own_share(batch))
        step = make_train_step(supervised_loss(graph, config.router_aux_loss_coef, case.remat), optimizer)  # pyright: ignore[reportArgumentType]
        lowered = step.lower(described, batch)
        lowering = time.perf_counter() - began
        compiled = lowered.compile()
        compiling = time.perf_counter() - began - lowering
        start = jax.jit(begin, out_shardings=placed).lower().compile()
        if compile_only:
            return
        folder.joinpath(f"{case.name}.{jax.process_index()}.ready").touch()
        while not folder.joinpath(f"{case.name}.go").exists():
            time.sleep(0.05)
        state = start()
        times, first = [], None
        for _ in range(case.updates):
            began = time.perf_counter()
            state, report = compiled(state, batch)
            jax.block_until_ready(report)
            times.append(time.perf_counter() - began)
            first = first or jax.device_get((report.loss, report.grad_norm))
        assert first is not None
        seconds = statistics.median(times[1:])
        cut = case.tokens // case.sequences
        pairs = case.rows * case.sequences * cut * (cut + 1) / 2
        flops = training_flops(config, case.rows * case.tokens, pairs)
        device = jax.local_devices()[0]
        peak = peak_flops(device.device_kind) or math.nan
        row: dict[str, Any] = {
            **dataclasses.asdict(case),
            "cards": case.cards,
            "device": device.device_kind,
            "jax": jax.__version__,
            "ms": seconds * 1e3,
            "times": [round(t * 1e3, 2) for t in times],
            "tokens/s": case.rows * case.tokens / seconds,
            "MFU %": 100 * flops / seconds / peak / case.cards,
            "loss": float(first[0]),
            "gradient norm": float(first[1]),
            "peak GB": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
            "lower s": lowering,
            "compile s": compiling,
        }
        write(folder, case, row)  # what follows may fail
        row["communicates GB"] = {kind: size / 1e9 for kind, (_, size) in totals(collectives(compiled)).items()}
        memory = compiled.memory_analysis()
        row["program GB"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
        write(folder, case, row)
        if case.updates > 2:
            with tempfile.TemporaryDirectory() as traced:
                with jax.profiler.trace(traced):
                    state, report = compiled(state, batch)
                    jax.block_until_ready(report)
                from experiments.scaling import trace

                row["trace ms"], lines = trace.read(Path(traced))
            write(folder, case, row)
            if jax.process_index() == 0:
                folder.joinpath(f"{case.name}.kernels.txt").write_text("\n".join(lines))


def rows(case: Case, words: int, np: Any, batch: Any) -> Any:
    """Random tokens, the same for all cases of as many rows."""
    shape = (case.micro_batches, case.rows // case.micro_batches, case.tokens)
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, words, shape).astype(np.int32) for _ in range(2))
    segments = np.broadcast_to(np.arange(case.tokens) * case.sequences // case.tokens, shape).astype(np.int32)
    weight = np.full(shape, 1 / math.prod(shape), np.float32)
    return batch.of(tokens=tokens, targets=targets, segment_ids=segments, mask=np.ones(shape, bool), weight=weight)


def write(folder: Path, case: Case, row: dict[str, Any]) -> None:
    import jax

    if jax.process_index() == 0:
        file = folder.joinpath(f"{case.name}.json")
        file.with_suffix(".part").write_text(json.dumps(row, indent=1))
        file.with_suffix(".part").rename(file)


if __name__ == "__main__":
    main()
