"""An update of training on one GPU: time, MFU, what compiling took, and where the time goes, kernel by kernel.

    python -m experiments.gpu_model.update m1-2b:8x4096:none m1-1b:8x4096:none --profile

Each case is PRESET:ROWSxTOKENS:REMAT. bfloat16 compute, float32 master weights, AdamW, packed rows of four sequences,
balancing loss on. MFU counts as ``m1jax.flops`` does, nothing for recomputation. The last line is everything as JSON.
"""

import argparse
import collections
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from m1jax.config import ModelConfig
from m1jax.flops import peak_flops, training_flops
from m1jax.model import MiniMaxM1
from m1jax.train.batch import Batch
from m1jax.train.loop import supervised_loss
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.step import init_state, make_train_step

SEQUENCES = 4  # packed into a row
IN_A_ROW = 8  # updates, of which only the last is waited for


def case(preset: str, rows: int, tokens: int, remat: Any, profile: bool) -> dict[str, Any]:
    config = ModelConfig.preset(preset)
    graph, params = nnx.split(jax.jit(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0)))())
    optimizer = OptimizerConfig(learning_rate=1e-4).build(1000)
    state = jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(params)
    rng = np.random.default_rng(0)
    cut = tokens // SEQUENCES
    shape = (1, rows, tokens)
    ids = np.broadcast_to(np.arange(tokens) // cut, shape)
    words = (rng.integers(0, config.vocab_size, shape).astype(np.int32) for _ in range(2))
    batch = Batch.of(
        tokens=next(words),
        targets=next(words),
        segment_ids=ids.astype(np.int32),
        mask=np.ones(shape, bool),
        weight=np.full(shape, 1 / (rows * tokens), np.float32),
    )
    batch = jax.device_put(batch)
    step = make_train_step(supervised_loss(graph, config.router_aux_loss_coef, remat), optimizer)
    begin = time.perf_counter()
    traced = step.trace(state, batch)
    trace = time.perf_counter() - begin
    lowered = traced.lower()
    lower = time.perf_counter() - begin - trace
    compiled = lowered.compile()
    compiling = time.perf_counter() - begin - trace - lower
    memory = compiled.memory_analysis()
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        state, stats = compiled(state, batch)
        jax.block_until_ready(stats)
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[1:])
    begin = time.perf_counter()
    for _ in range(IN_A_ROW):
        state, stats = compiled(state, batch)
    jax.block_until_ready(stats)
    in_a_row = (time.perf_counter() - begin) / IN_A_ROW
    pairs = rows * SEQUENCES * cut * (cut + 1) / 2
    flops = training_flops(config, rows * tokens, pairs)
    peak = peak_flops(jax.devices()[0].device_kind) or float("nan")
    row = {
        "case": f"{preset}:{rows}x{tokens}:{remat}",
        "ms": seconds * 1e3,
        "ms in a row": in_a_row * 1e3,
        "tokens/s": rows * tokens / seconds,
        "MFU %": 100 * flops / seconds / peak,
        "trace s": trace,
        "lower s": lower,
        "compile s": compiling,
        "GB": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "loss": float(stats.loss),
    }
    if profile:
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                state, stats = compiled(state, batch)
                jax.block_until_ready(stats)
            kernels(Path(directory), f"{preset}-{rows}x{tokens}", compiled.as_text() or "")
    return row


def kernels(directory: Path, name: str, program: str) -> None:
    """Prints what ran on the GPU, summed by name, longest first; with OUT set, all of it and the program go there."""
    from jax.profiler import ProfileData

    total: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    (file,) = directory.rglob("*.xplane.pb")
    spans: list[tuple[float, float, str]] = []
    for plane in ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                label = event.name
                total[label] += event.duration_ns / 1e6
                calls[label] += 1
                spans.append((event.start_ns, event.start_ns + event.duration_ns, label))
    spans.sort()
    idle: dict[str, float] = collections.defaultdict(float)
    end, before = spans[0][0], ""
    for start, stop, label in spans:
        if start > end:
            idle[f"{before[:50]} -> {label[:50]}"] += (start - end) / 1e6
        if stop > end:
            end, before = stop, label
    whole = (end - spans[0][0]) / 1e6
    lines = [f"{name}: {sum(total.values()):.1f} ms of kernels in {whole:.1f} ms, {sum(idle.values()):.1f} ms idle"]
    lines += [f"{ms:9.3f} ms idle, {label}" for label, ms in sorted(idle.items(), key=lambda x: -x[1])[:15]]
    lines += [f"{ms:9.3f} ms {calls[label]:6d} x {label[:110]}" for label, ms in total.most_common(45)]
    print("\n".join(lines), flush=True)
    if out := os.environ.get("OUT"):
        Path(out, f"program-{name}.txt").write_text(program)
        Path(out, f"kernels-{name}.txt").write_text(
            "\n".join(f"{ms:9.3f} ms {calls[label]:6d} x {label}" for label, ms in total.most_common())
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    rows = []
    print(jax.devices()[0].device_kind, "JAX", jax.__version__, flush=True)
    for text in arguments.cases:
        preset, shape, remat = text.split(":")
        try:
            count, tokens = map(int, shape.split("x"))
            row = case(preset, count, tokens, remat, arguments.profile)
        except Exception as error:  # the other cases go on
            row = {"case": text, "failed": f"{type(error).__name__}: {error}"[:1500]}
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
