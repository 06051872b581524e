"""Does what else the engine is doing change what a request gets?

    python -m experiments.engine_speed.independence
    python -m experiments.engine_speed.independence --preset m1-1b --std 0.02 --temperature 0     a GPU: bfloat16

The same requests alone, and then in each kind of company: how many of their tokens are the same (up to the first that
differs, after which nothing is comparable), and the largest difference of a log-probability among those.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig
from m1jax.inference import Completion, Engine, Finished, Request, Sampling
from m1jax.inference.capacity import Capacity
from m1jax.inference.runner import ModelRunner
from m1jax.inference.scheduler import Counts

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and where to write it."""

    out: Path = HERE / "independence.json"
    """JSON with every figure; the table is written beside it."""
    preset: str = "m1-tiny"
    std: float = 0.1
    """Standard deviation of the random weights: large enough that the next token is not any token."""
    temperature: float = 1.0
    """Of drawing; 0 takes the likeliest token. Where rounding reorders tokens as likely as each other, as in
    bfloat16 with random weights, only that can be compared."""
    probes: int = 8
    """Requests whose tokens are compared."""
    prompt: int = 100
    """Their tokens."""
    new: int = 64
    """Tokens they write."""


def main(config: Config) -> None:
    """Prints and writes the table."""
    model_config = dataclasses.replace(ModelConfig.preset(config.preset), initializer_range=config.std)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = jax.jit(lambda: MiniMaxM1(model_config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))()
    rng = np.random.default_rng(0)
    vocab = model_config.vocab_size

    def request(seed: int, tokens: int, new: int) -> Request:
        prompt = rng.integers(0, vocab, tokens).astype(np.int32)
        return Request(prompt, jax.random.key(seed), Sampling(max_new_tokens=new, temperature=config.temperature))

    probes = [request(number, config.prompt, config.new) for number in range(config.probes)]
    others = [request(1000 + number, 20 + 5 * number, config.new) for number in range(31)]
    capacity = Capacity(
        rows=32,
        max_length=2 * (config.prompt + config.new),
        page_size=64,
        pages=500,
        snapshots=64,
        steps=4,
        decode=(1, 32),
        prefill=((1, 32), (1, 128)),
        stall=32,
        ahead=True,
    )
    runner = ModelRunner(*nnx.split(model), capacity)

    def served(engine: Engine, probe: Request, before: list[Request]) -> Completion:
        for other in before:
            engine.submit(other)
        ticket = engine.submit(probe)
        while True:
            for event in engine.step():
                if isinstance(event, Finished) and event.ticket == ticket:
                    return event.completion

    def fresh(probe: Request, before: list[Request]) -> Completion:
        return served(Engine(runner), probe, before)

    def hit(probe: Request) -> Completion:
        engine = Engine(runner)
        beginning = dataclasses.replace(probe, tokens=probe.tokens[: config.prompt // 2], keep=True)
        list(engine.run([beginning, dataclasses.replace(probe, key=jax.random.key(77))]))
        reused = engine.counts.reused
        completion = served(engine, probe, [])
        assert engine.counts.reused > reused
        return completion

    alone = [fresh(probe, []) for probe in probes]
    rows: dict[str, Any] = {}

    def case(name: str, serve: Callable[[Request], Completion]) -> None:
        rows[name] = compared(alone, [serve(probe) for probe in probes])
        print(name, rows[name], flush=True)
        write(config, rows, jnp.dtype(dtype).name)

    case("again", lambda probe: fresh(probe, []))
    case(f"among {len(others)} others", lambda probe: fresh(probe, others))
    case("a prefix is hit", hit)
    few = capacity.pages_for(config.prompt + config.new) * 3 - 1
    scarce = ModelRunner(*nnx.split(model), dataclasses.replace(capacity, pages=few, decode=(32,), snapshots=0))
    preempted: list[Counts] = []

    def among_five(probe: Request) -> Completion:
        engine = Engine(scarce)
        completion = served(engine, probe, [dataclasses.replace(p, key=jax.random.key(5)) for p in probes[:4]])
        assert engine.counts.preempted
        preempted.append(engine.counts)
        return completion

    name = "among five with pages for less than three: preempted"
    case(name, among_five)
    read = 5 * (config.prompt - 1)
    rows[name] |= {
        "preempted": sum(counts.preempted for counts in preempted),
        "recomputed": sum(counts.prefilled - read for counts in preempted),
        "written": 5 * config.new * len(preempted),
    }
    pieces = ModelRunner(*nnx.split(model), dataclasses.replace(capacity, prefill=((1, 7),), decode=(32,), stall=7))
    case("read in chunks of 7", lambda probe: served(Engine(pieces), probe, []))
    print(write(config, rows, jnp.dtype(dtype).name))


def compared(expected: list[Completion], found: list[Completion]) -> dict[str, float]:
    same = total = 0
    gap, exact = 0.0, 0
    for a, b in zip(expected, found):
        differ = np.flatnonzero(a.tokens != b.tokens)
        until = int(differ[0]) if len(differ) else len(a.tokens)
        same, total = same + until, total + len(a.tokens)
        gap = max(gap, float(np.abs(a.logp[:until] - b.logp[:until]).max(initial=0.0)))
        exact += int((a.logp[:until] == b.logp[:until]).sum())
    return {"tokens": total, "same": same / total, "gap": gap, "to_the_bit": exact / max(1, same)}


def write(config: Config, rows: dict[str, Any], dtype: str) -> str:
    device = jax.devices()[0].device_kind
    lines = [
        f"| {config.preset}, {dtype}, {device} | same tokens | largest gap of a log-probability | same to the bit |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['same']:.1%} of {row['tokens']} | {row['gap']:.1e} | {row['to_the_bit']:.0%} |")
    for row in rows.values():
        if "recomputed" in row:
            lines.append(
                f"\n{row['preempted']} preemptions: {row['recomputed']} tokens were computed again, {row['written']} "
                "were written."
            )
    config.out.write_text(
        json.dumps({"device": device, "dtype": dtype, "preset": config.preset, "rows": rows}, indent=1)
    )
    config.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
