"""How fast the engine is: beside Transformers, against its own steady decode rate, to a first token, beside a prefill.

    python -m experiments.engine_speed.engine_speed
    python -m experiments.engine_speed.engine_speed --preset m1-1b --requests 256 --mean 400 --max 4096 --long 16384

The first is for a CPU (minutes), the second for a GPU.

Prints a table and writes it, all figures (JSON) and a picture. Every part runs on the same engine, except the
comparison with Transformers, which has one for each number of requests.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments.cpu_speed.cpu_speed import MAIN, read_bandwidth
from experiments.engine_speed.measured import MeasuredRunner, Record, compilations, step_bytes
from experiments.engine_speed.peer import Peer
from experiments.gpu_model.decode import copy_rate
from m1jax import MiniMaxM1, ModelConfig
from m1jax.inference import Engine, Finished, Request, Sampling, Ticket, Wrote
from m1jax.inference.capacity import Capacity
from m1jax.inference.memory import capacity_for

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and where to write it."""

    out: Path = HERE / "result.json"
    """JSON with every figure; the table and the picture are written beside it."""
    preset: str = ""
    """Of the model; without one the 94 M model of experiments/cpu_speed."""
    requests: int = 64
    """Of the long tail."""
    mean: int = 48
    """Tokens that they write on average: a log-normal distribution, cut at `max`."""
    max: int = 384
    """Tokens that the longest writes."""
    prefix: tuple[int, ...] = (4096,)
    """Tokens of the prompts that are hit."""
    long: int = 1024
    """Tokens of the prompt that others must not wait for."""
    rows: int | None = None
    """Sequences in work at once; None: what the device has room for."""
    peer: tuple[int, ...] = (32, 8)
    """Numbers of requests beside Transformers, which runs on a CPU; none on a GPU."""
    threads: int = 2
    """PyTorch's threads."""
    repeat: int = 3
    """Times that engine and Transformers take turns; the best of each counts."""


def main(config: Config) -> None:
    """Runs every part, prints and writes the table."""
    cpu = jax.default_backend() == "cpu"
    model_config = ModelConfig.preset(config.preset) if config.preset else MAIN
    dtype = jnp.float32 if cpu else jnp.bfloat16
    model = jax.jit(lambda: MiniMaxM1(model_config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))()
    bandwidth = read_bandwidth(5) if cpu else copy_rate()
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "model": config.preset or "94 M",
        "dtype": jnp.dtype(dtype).name,
        "bandwidth_gb_s": bandwidth / 1e9,
    }
    print(results, flush=True)

    def note(name: str, figures: dict[str, Any]) -> None:
        results[name] = figures
        print(name, json.dumps(figures), flush=True)
        write(config, results)

    if cpu:
        for count in config.peer:
            note(f"beside Transformers, {count}", beside(model, count, config, bandwidth))
    length = min(max(*config.prefix, config.long) + 64 + config.max, model_config.max_position_embeddings)
    capacity = capacity_for(model_config, dtype, rows=config.rows, max_length=length)
    begin = time.perf_counter()
    with compilations() as programs:
        runner = MeasuredRunner(*nnx.split(model), capacity)
    note("start", {"seconds": time.perf_counter() - begin, "programs": len(programs), "rows": capacity.rows})
    with compilations() as programs:
        engine = Engine(runner)
        note("long tail", long_tail(engine, runner, config, model, bandwidth))
        runner.waits = False
        for prefix in config.prefix:
            note(f"prefix {prefix}", first_token(engine, prefix, model_config.vocab_size))
        note("stall", stall(engine, capacity, config, model_config.vocab_size))
    note("compiled while serving", {"programs": dict(Counter(programs))})
    print(table(results))


def beside(model: MiniMaxM1, count: int, config: Config, bandwidth: float) -> dict[str, Any]:
    """Requests of mixed lengths: the engine and Transformers in turn, all requests at once."""
    rng = np.random.default_rng(count)
    requests = [
        asked(rng, number, model.config.vocab_size, prompt=int(rng.integers(16, 129)), new=int(rng.integers(16, 193)))
        for number in range(count)
    ]
    capacity = capacity_for(model.config, model.dtype, rows=count, max_length=384)
    runner = MeasuredRunner(*nnx.split(model), capacity)
    peer = Peer(model, config.threads)
    tokens = sum(request.sampling.max_new_tokens for request in requests)
    batches = [count] if count <= 8 else [count, 8]
    ours: list[tuple[Seconds, Record]] = []
    theirs: dict[int, list[Seconds]] = {batch: [] for batch in batches}
    for _ in range(config.repeat):
        runner.record = Record()
        ours.append((timed(lambda: list(Engine(runner).run(requests))), runner.record))
        for batch in batches:
            theirs[batch].append(timed(functools.partial(peer.serve, requests, batch)))
    (seconds, record), best = min(ours, key=lambda pair: pair[0].wall), {b: best_of(t) for b, t in theirs.items()}
    processor = best_of([seconds for seconds, _ in ours]).processor
    bound = sum(step_bytes(model.config, model.dtype, *step) for step in record.alive) / bandwidth
    return {
        "tokens": tokens,
        "ours_tokens_s": tokens / seconds.wall,
        "theirs_tokens_s": {str(batch): tokens / s.wall for batch, s in best.items()},
        "speedup": min(s.wall for s in best.values()) / seconds.wall,
        "processor_s": {"ours": processor} | {f"theirs, {batch}": s.processor for batch, s in best.items()},
        "speedup_processor": min(s.processor for s in best.values()) / processor,
        "bound_share_decode": bound / record.decode_s,
        "bound_share_all": bound / seconds.wall,
        "prefill_s": record.prefill_s,
        "decode_s": record.decode_s,
        "host_share": 1 - record.device_s / seconds.wall,
    }


class Seconds(NamedTuple):
    wall: float
    processor: float
    """of all threads of this process: what others do on the machine changes it little"""


def timed(call: Callable[[], object]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def best_of(times: Sequence[Seconds]) -> Seconds:
    return Seconds(min(t.wall for t in times), min(t.processor for t in times))


def asked(rng: np.random.Generator, seed: int, vocab: int, *, prompt: int, new: int, **options: Any) -> Request:
    """A request of random tokens that writes exactly `new`."""
    tokens = rng.integers(0, vocab, prompt).astype(np.int32)
    return Request(tokens, jax.random.key(seed), Sampling(max_new_tokens=new), **options)


def long_tail(
    engine: Engine, runner: MeasuredRunner, config: Config, model: MiniMaxM1, bandwidth: float
) -> dict[str, Any]:
    """All requests at once, prompts of 64 tokens, log-normal lengths: tokens/s over all, until the last has begun to
    write, and while all rows are at work."""
    rng, vocab, count = np.random.default_rng(0), model.config.vocab_size, config.requests
    lengths = tail(rng, count, config.mean, config.max)
    requests = [asked(rng, number, vocab, prompt=64, new=int(new), keep=False) for number, new in enumerate(lengths)]
    rows = min(runner.capacity.rows, count)
    steady = steady_rate(engine, runner, rows, vocab)

    runner.record = Record()
    begin = time.perf_counter()
    wrote, begun, full = 0, set[Ticket](), (0.0, 0)
    for request in requests:
        engine.submit(request)
    while engine.busy:
        events = engine.step()
        if len(begun) < count:
            told = [event for event in events if isinstance(event, Wrote)]
            wrote += sum(len(event.tokens) for event in told)
            begun |= {event.ticket for event in told}
            full = time.perf_counter() - begin, wrote
    seconds, record = time.perf_counter() - begin, runner.record
    idle = runner.idle_decode_s()
    bound = sum(step_bytes(model.config, model.dtype, *step) for step in record.alive) / bandwidth
    # What decoding takes beyond the device's own time for as many steps is the engine's: scheduling, starting calls,
    # bringing results home, steps in which the device waits.
    step_s = {rows: runner.step_s(rows) for rows in {*record.programs, runner.capacity.decode[0]}}
    waited = 0.0 if runner.capacity.ahead else record.prefill_s + record.copy_s
    overhead = seconds - waited - runner.started_s(record)
    overhead -= sum(steps * step_s[rows] for rows, (steps, _) in record.programs.items())
    return {
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "rows": rows,
        "requests": count,
        "tokens_s": int(lengths.sum()) / seconds,
        "steady_tokens_s": steady,
        "of_steady": int(lengths.sum()) / seconds / steady,
        "of_steady_full": full[1] / full[0] / steady,
        "full_s": full[0],
        # All at the steady rate, but the longest cannot take less than its steps.
        "limit": min(1.0, int(lengths.sum()) / steady / (int(lengths.max()) * step_s[runner.capacity.decode[0]])),
        "decode_tokens_s": int(lengths.sum()) / record.decode_s,
        "mean_rows_alive": float(np.mean([alive for alive, _ in record.alive])),
        "steps": len(record.alive),
        "step_ms": 1e3 * record.decode_s / len(record.alive),
        "programs": {
            rows: {"steps": steps, "step_ms": 1e3 * seconds / steps, "device_step_ms": 1e3 * step_s[rows]}
            for rows, (steps, seconds) in record.programs.items()
        },
        "bound_share_decode": bound / record.decode_s,
        "seconds": seconds,
        "decode_s": record.decode_s,
        "prefill_s": record.prefill_s,
        "copy_s": record.copy_s,
        "calls": record.calls,
        "idle_call_ms": 1e3 * idle,
        "overhead": overhead / seconds,
        "overhead_ms_a_step": 1e3 * overhead / len(record.alive),
    }


def tail(rng: np.random.Generator, count: int, mean: int, longest: int) -> np.ndarray:
    """Lengths int64 [count] with that mean and that maximum: log-normal, sigma 1, cut."""
    drawn = np.exp(rng.normal(0, 1, count))
    low, high = 0.0, float(longest)
    for _ in range(60):  # the scale that has the mean, once cut
        scale = (low + high) / 2
        low, high = (scale, high) if np.clip(drawn * scale, 1, longest).mean() < mean else (low, scale)
    lengths = np.clip(np.round(drawn * scale), 1, longest).astype(np.int64)
    lengths[lengths.argmax()] = longest
    return lengths


def steady_rate(engine: Engine, runner: MeasuredRunner, rows: int, vocab: int) -> float:
    """Tokens per second of the decode program with every row at work, prompts as in the long tail."""
    steps = runner.capacity.steps
    rng = np.random.default_rng(1)
    for number in range(rows):
        engine.submit(asked(rng, number, vocab, prompt=64, new=8 * steps, keep=False))
    rates = []
    while engine.busy:
        before = dataclasses.replace(runner.record)
        count = len(runner.record.alive)
        engine.step()
        after = runner.record
        wrote = [alive for alive, _ in after.alive[count:]]
        if len(wrote) == steps and min(wrote) == rows and after.prefill_s == before.prefill_s:
            rates.append(rows * steps / (after.decode_s - before.decode_s))
    return float(np.median(rates))


def first_token(engine: Engine, tokens: int, vocab: int) -> dict[str, Any]:
    """Seconds from `submit` to the first token, of prompts whose first tokens nobody has seen, and of others' that
    were kept; nobody else is at work. Medians of the later times: a GPU's first ones are longer."""
    rng = np.random.default_rng(2)
    cold, hit = [], []
    for number in range(9):
        prefix = rng.integers(0, vocab, tokens).astype(np.int32)
        for times in (cold, hit):
            user = rng.integers(0, vocab, 32).astype(np.int32)
            sampling = Sampling(max_new_tokens=4)
            request = Request(
                np.concatenate([prefix, user]), jax.random.key(number), sampling, junctions=(len(prefix),)
            )
            begin = time.perf_counter()
            engine.submit(request)
            while not any(isinstance(event, Wrote) for event in engine.step()):
                pass
            times.append(time.perf_counter() - begin)
            while engine.busy:
                engine.step()
    return {
        "cold_s": float(np.median(cold[3:])),
        "hit_s": float(np.median(hit[3:])),
        "speedup": np.median(cold[3:]) / np.median(hit[3:]),
        "each_ms": [[1e3 * seconds for seconds in times] for times in (cold, hit)],
    }


def stall(engine: Engine, capacity: Capacity, config: Config, vocab: int) -> dict[str, Any]:
    """Seconds of the steps in which eight others write, alone and while a long prompt is read in pieces."""
    rng = np.random.default_rng(3)
    alone: list[float] = []
    beside: list[float] = []
    new = capacity.max_length - 32
    writers = [
        engine.submit(asked(rng, number, vocab, prompt=32, new=new, keep=False))
        for number in range(min(8, capacity.rows - 1))
    ]
    while len(alone) < 60:
        begin = time.perf_counter()
        events = engine.step()
        if len({event.ticket for event in events if isinstance(event, Wrote)}) == len(writers):
            alone.append(time.perf_counter() - begin)
    long = engine.submit(asked(rng, 99, vocab, prompt=config.long, new=1, keep=False))
    over = False
    while not over:
        begin = time.perf_counter()
        events = engine.step()
        beside.append(time.perf_counter() - begin)
        over = any(isinstance(event, Finished) and event.ticket == long for event in events)
    for ticket in writers:
        engine.cancel(ticket)
    while engine.busy:
        engine.step()
    figures = {name: float(np.percentile(x, 99)) for name, x in (("alone_p99_s", alone), ("beside_p99_s", beside))}
    return figures | {
        "alone_median_s": float(np.median(alone)),
        "beside_median_s": float(np.median(beside)),
        "p99": figures["beside_p99_s"] / figures["alone_p99_s"],
        "median": float(np.median(beside) / np.median(alone)),
        "steps": len(beside),
    }


def table(results: dict[str, Any]) -> str:
    """What was measured, and the goals, in Markdown."""
    rows = []
    for name, x in results.items():
        if name.startswith("beside Transformers"):
            count = int(name.rpartition(" ")[2])
            theirs = " / ".join(f"{rate:.0f} (batches of {batch})" for batch, rate in x["theirs_tokens_s"].items())
            rows += [
                (f"{count} requests of mixed lengths, tokens/s", f"{x['ours_tokens_s']:.0f}", ""),
                ("... Transformers `generate`", theirs, ""),
                ("... times as fast", f"{x['speedup']:.1f}x", ">= 3x" if count > 8 else ">= 2x"),
                ("... by processor time", f"{x['speedup_processor']:.1f}x", ""),
                ("... share of the bandwidth bound, decoding", f"{x['bound_share_decode']:.0%}", ""),
            ]
    for x in (x for name, x in results.items() if name.startswith("long tail")):
        programs = sorted(x["programs"].items(), key=lambda item: int(item[0]))
        rows += [
            (
                f"long tail, {x['requests']} requests, {x['tokens']} tokens, longest {x['longest']}: tokens/s",
                f"{x['tokens_s']:.0f}",
                "",
            ),
            (f"... steady decode rate, {x['rows']} rows", f"{x['steady_tokens_s']:.0f}", ""),
            ("... share of it, until the last has begun", f"{x['of_steady_full']:.0%}", ">= 85 %"),
            ("... share of it, until the last has ended", f"{x['of_steady']:.0%}", ""),
            ("... the most that its longest request leaves possible", f"{x['limit']:.0%}", ""),
            ("... rows that write, mean", f"{x['mean_rows_alive']:.0f}", ""),
            (
                f"... steps in programs of {' / '.join(str(size) for size, _ in programs)} rows",
                " / ".join(f"{p['steps']} of {p['device_step_ms']:.2f} ms" for _, p in programs),
                "",
            ),
            ("... engine's own share of the time", f"{x['overhead']:.1%}", "<= 5 %"),
        ]
    for name, x in ((name, x) for name, x in results.items() if name.startswith("prefix")):
        both = f"{x['cold_s'] * 1e3:.1f} / {x['hit_s'] * 1e3:.1f} ms"
        rows += [
            (f"first token, {name.split()[1]} tokens, cold / kept", both, ""),
            ("... times as fast", f"{x['speedup']:.1f}x", ">= 5x"),
        ]
    if x := results.get("stall"):
        beside = f"{x['alone_p99_s'] * 1e3:.0f} / {x['beside_p99_s'] * 1e3:.0f} ms"
        rows += [
            ("others' step, p99, alone / while a long prompt is read", beside, ""),
            ("... times as long", f"{x['p99']:.2f}x (median {x['median']:.2f}x)", "<= 2x"),
        ]
    if x := results.get("start"):
        rows.append(("start: programs compiled", f"{x['programs']} in {x['seconds']:.0f} s", ""))
    if x := results.get("compiled while serving"):
        rows.append(("programs compiled while serving", str(sum(x["programs"].values())), "0"))
    title = f"{results['model']}, {results['dtype']}, {results['device']}"
    return "\n".join(
        [f"| {title} | measured | goal |\n|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    )


def write(config: Config, results: dict[str, Any]) -> None:
    """JSON, the table and a picture, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(results, indent=1) + "\n")
    config.out.with_suffix(".md").write_text(table(results) + "\n")
    bars = {}
    for name, x in results.items():
        if name.startswith("beside Transformers"):
            count = name.rpartition(" ")[2]
            bars[f"engine, {count} requests"] = x["ours_tokens_s"]
            bars[f"Transformers, {count} requests"] = max(x["theirs_tokens_s"].values())
    if x := results.get("long tail"):
        bars |= {"engine, long tail": x["tokens_s"], "engine, all rows at work": x["steady_tokens_s"]}
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(bars) + 1.2))
    axes.barh(list(bars), list(bars.values()), color=["#bbbbbb" if "Trans" in name else "#4477aa" for name in bars])
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens/s, {results['model']}, {results['device']}")
    figure.tight_layout()
    figure.savefig(config.out.with_suffix(".png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config))
