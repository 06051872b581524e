"""The amplification again, with trained weights; and which weights it comes from."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from experiments.precision_mismatch import amplification, figure3
from experiments.precision_mismatch.amplification import Setting, Unit
from experiments.precision_mismatch.lines import Lines, Record
from m1jax.config import M1_ALPHA, SOFTMAX
from m1jax.model import MiniMaxM1

SEEDS = (0, 1, 2)
STEPS, ROWS, RATE = 300, 16, 2e-3
BASE = "depth 16"
PARTS = ("embed_tokens", "['attention']", "['w", "['gate']", "layernorm", "lm_head")
"""of paths of parameters, moved alone in the model of sixteen layers"""
NAMES = dict(zip(("", *PARTS), ("everything", "embedding", "attention", "experts", "routers", "norms", "head")))


def settings() -> dict[str, Setting]:
    """Trained each by itself, the first one first."""
    base = Setting()
    found = {BASE: base, "alpha 1, beta 1": base._replace(alpha=1.0)}
    found |= {"alpha 7.1, beta 1": base._replace(alpha=2 * M1_ALPHA)}
    found |= {f"depth {n}": base._replace(depth=n) for n in (4, 8, 32)}
    found |= {"one expert": base._replace(experts=1), "16 experts": base._replace(experts=16)}
    return found | {"all lightning": base._replace(kinds="lightning"), "all softmax": base._replace(kinds=SOFTMAX)}


def train(setting: Setting, seed: int, code: np.ndarray) -> tuple[MiniMaxM1, float]:
    """A model of bytes of source code, float32 throughout, and its last losses in nats."""
    alphas = dict.fromkeys(("lightning_alpha", "softmax_alpha", "mlp_alpha"), setting.alpha)
    made = dataclasses.replace(amplification.config(setting), **alphas)
    graph, params = nnx.split(MiniMaxM1(made, rngs=nnx.Rngs(seed), dtype=jnp.float32))
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 6, STEPS, RATE / 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.9, b2=0.95))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: nnx.State, state: Any, tokens: Array) -> Any:
        def loss(params: nnx.State) -> Array:
            model = nnx.merge(graph, params)
            return -jnp.mean(model.log_probs(model.forward(tokens[:, :-1]).hidden, tokens[:, 1:])[0])

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    rng, state, losses = np.random.default_rng(seed), optimizer.init(params), []
    for _ in range(STEPS):
        params, state, value = step(params, state, rows(code, rng, ROWS))
        losses = [*losses[-19:], value]
    return nnx.merge(graph, params), float(np.mean([float(x) for x in losses]))


def rows(code: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    starts = rng.integers(0, len(code) - amplification.TIME - 1, count)
    return np.stack([code[s : s + amplification.TIME + 1] for s in starts]).astype(np.int32)


def measure(out: Path, names: Sequence[str]) -> list[Record]:
    """Adds to `trained.jsonl` what is not there yet; all of it."""
    lines, code = Lines(out / "trained.jsonl"), figure3.corpus()
    there = {(r["name"], r["seed"]) for r in lines.records}
    for name in names:
        setting = settings()[name]
        for seed in SEEDS:
            if (name, seed) in there:
                continue
            begun = time.monotonic()
            model, loss = train(setting, seed, code)
            tokens = jnp.asarray(rows(code, np.random.default_rng(seed + 2000), amplification.BATCH)[:, :-1])
            parts = ("", *PARTS) if name == BASE else ("",)
            found = []
            for unit in get_args(Unit):
                for replay, part in [(False, part) for part in parts] + [(True, "")]:
                    how = setting._replace(replay=replay)
                    moved = amplification.compare(model, tokens, how, seed, unit, part)
                    found.append({"unit": unit, "replay": replay, "part": part} | moved._asdict())
            lines.add({"name": name, "seed": seed, "loss": loss, "found": found})
            print(f"{name}, seed {seed}: loss {loss:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    return lines.records


def table(records: list[Record]) -> str:
    """Markdown: what the logits change by, medians over seeds; then by which weights are moved."""

    def median(name: str, what: str, unit: Unit, replay: bool = False, part: str = "") -> float:
        wanted = {"unit": unit, "replay": replay, "part": part}
        found = [f for r in records if r["name"] == name for f in r["found"] if wanted.items() <= f.items()]
        return float(np.median([f[what] for f in found]))

    lines = [
        "| setting | loss | float32's unit, relative | largest | bfloat16's unit, relative | routes replayed "
        "| flipped routes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["name"] for r in records):
        loss = np.median([r["loss"] for r in records if r["name"] == name])
        lines.append(
            f"| {name} | {loss:.2f} | {median(name, 'logits', 'float32'):.1e} "
            f"| {median(name, 'logits_max', 'float32'):.1e} | {median(name, 'logits', 'bfloat16'):.1e} "
            f"| {median(name, 'logits', 'bfloat16', True):.1e} | {median(name, 'flipped', 'bfloat16'):.2%} |"
        )
    lines += ["", "| moved alone (sixteen layers) | float32's unit | bfloat16's unit | flipped routes |"]
    lines += ["|---|---|---|---|"]
    for part in ("", *PARTS) if any(r["name"] == BASE for r in records) else ():
        figures = [median(BASE, "logits", unit, False, part) for unit in get_args(Unit)]
        flipped = median(BASE, "flipped", "bfloat16", False, part)
        lines.append(f"| {NAMES[part]} | {figures[0]:.1e} | {figures[1]:.1e} | {flipped:.2%} |")
    return "\n".join(lines) + "\n"
