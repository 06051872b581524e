"""The amplification again, with trained weights; and which weights it comes from."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.precision_mismatch import amplification, figure3, language
from experiments.precision_mismatch.amplification import Setting, Unit
from experiments.precision_mismatch.language import Schedule
from experiments.precision_mismatch.lines import Lines, Record
from m1jax import from_pretrained
from m1jax.chat import Tokenizer
from m1jax.config import M1_ALPHA, SOFTMAX
from m1jax.model import MiniMaxM1
from m1jax.rl.tasks import get_task

SEEDS = (0, 1, 2)
STEPS, ROWS, RATE = 300, 8, 2e-3
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
    """A model of bytes of source code, float32 throughout, on the host; and its last losses in nats."""
    alphas = dict.fromkeys(("lightning_alpha", "softmax_alpha", "mlp_alpha"), setting.alpha)
    made = dataclasses.replace(amplification.config(setting), **alphas)
    model = MiniMaxM1(made, rngs=nnx.Rngs(seed), dtype=jnp.float32)
    rng = np.random.default_rng(seed)
    schedule = Schedule(RATE, STEPS // 6, STEPS)
    params, loss = language.train(model, schedule, (rows(code, rng, ROWS) for _ in range(STEPS)))
    return nnx.merge(nnx.graphdef(model), jax.device_get(params)), loss


def rows(code: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    starts = rng.integers(0, len(code) - amplification.TIME - 1, count)
    return np.stack([code[s : s + amplification.TIME + 1] for s in starts]).astype(np.int32)


def measure(out: Path, names: Sequence[str]) -> list[Record]:
    """Adds to `trained.jsonl` what is not there yet; all of it.

    Models are trained where they are trained fastest, and compared on a CPU, whose float32 products are float32's.
    """
    lines, code = Lines(out / "trained.jsonl"), figure3.corpus()
    there = {(r["name"], r["seed"]) for r in lines.records}
    for name in names:
        setting = settings()[name]
        for seed in SEEDS:
            if (name, seed) in there:
                continue
            begun = time.monotonic()
            model, loss = train(setting, seed, code)
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                found = moved_by_parts(model, setting, seed, code, ("", *PARTS) if name == BASE else ("",))
            lines.add({"name": name, "seed": seed, "loss": loss, "found": found})
            print(f"{name}, seed {seed}: loss {loss:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    return lines.records


def moved_by_parts(
    model: MiniMaxM1, setting: Setting, seed: int, code: np.ndarray, parts: Sequence[str]
) -> list[Record]:
    """What becomes of rows that the model has not read when these weights are moved, by each unit."""
    tokens = jnp.asarray(rows(code, np.random.default_rng(seed + 2000), amplification.BATCH)[:, :-1])
    found = []
    for unit in get_args(Unit):
        for replay, part in [(False, part) for part in parts] + [(True, "")]:
            how = setting._replace(replay=replay)
            moved = amplification.compare(model, tokens, how, seed, unit, part)
            found.append({"unit": unit, "replay": replay, "part": part} | moved._asdict())
    return found


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
    if all(r["name"] != BASE for r in records):
        return "\n".join(lines) + "\n"
    lines += ["", "| moved alone (sixteen layers) | float32's unit | bfloat16's unit | flipped routes |"]
    lines += ["|---|---|---|---|"]
    for part in ("", *PARTS):
        figures = [median(BASE, "logits", unit, False, part) for unit in get_args(Unit)]
        flipped = median(BASE, "flipped", "bfloat16", False, part)
        lines.append(f"| {NAMES[part]} | {figures[0]:.1e} | {figures[1]:.1e} | {flipped:.2%} |")
    return "\n".join(lines) + "\n"


def of_demo(folder: Path) -> str:
    """The same by parts for the model that `m1jax demo` has trained, on solutions of its task: Markdown."""
    graph, weights = nnx.split(from_pretrained(folder))
    task, words = get_task("sums"), Tokenizer.tiny()
    problems = [task.problem("heldout", 0, number) for number in range(8)]
    texts = [words.encode(problem.prompt + problem.demonstration(True)) for problem in problems]
    tokens = jnp.array([text[: min(map(len, texts))] for text in texts])
    logits = np.asarray(nnx.merge(graph, weights)(tokens))
    lines = ["| moved, `m1jax demo`'s model | float32's unit | largest | bfloat16's unit | largest |"]
    lines += ["|---|---|---|---|---|"]
    for part in ("", *PARTS):
        cells = []
        for unit in get_args(Unit):
            moved = [nnx.merge(graph, amplification.half_an_ulp(weights, unit, seed, part))(tokens) for seed in SEEDS]
            gaps = [np.asarray(other) - logits for other in moved]
            relative = np.median([np.linalg.norm(gap) / np.linalg.norm(logits) for gap in gaps])
            cells += [f"{relative:.1e}", f"{np.median([np.abs(gap).max() for gap in gaps]):.1e}"]
        lines.append(f"| {NAMES[part]} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nLargest logit {np.abs(logits).max():.0f}.\n"
