"""A million tokens, read in chunks and decoded on: time per token and memory, for the hybrid and its parts alone.

    python -m experiments.long_context.long_context                                  a CPU: half an hour and more
    python -m experiments.long_context.long_context --preset m1-2b --chunk 16384     a GPU: minutes

Three models of the same width: the hybrid, its lightning layers alone, and one with softmax attention in every layer,
which stops earlier. Each reads one sequence from its first token to its last, and wherever it has read one of the
lengths it decodes a few tokens, which become part of the sequence. What was measured is written at once, and the memory
of the sequence is saved beside it now and then: started again, the program goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig
from m1jax.config import LIGHTNING, SOFTMAX
from m1jax.inference.runner import prepared
from m1jax.model import Cache
from m1jax.model.cache import key_value_bytes, state_bytes

HERE = Path(__file__).parent
SMALL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    layer_types=(LIGHTNING,) * 7 + (SOFTMAX,),
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    rotary_dim=32,
    num_experts=4,
    experts_per_token=2,
)
DECODED = 32
"""Tokens that are decoded at each length."""
READ = 4
"""Chunks before each length whose times are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and where to write it."""

    out: Path = HERE / "result.json"
    """JSON with every figure; the table and the picture are written beside it."""
    preset: str = ""
    """Of the hybrid; without one 8 layers of width 64."""
    models: tuple[str, ...] = ("lightning", "hybrid", "softmax")
    """Which of them, in this order."""
    lengths: tuple[int, ...] = (16_384, 65_536, 262_144, 1_048_576)
    """Tokens of context at which to measure."""
    softmax_until: int = 262_144
    """The longest context of the model with softmax attention alone."""
    chunk: int = 4096
    """Tokens read at a time."""
    save_every: int = 65_536
    """Tokens between two copies of the memory on disk; 0: none."""


def main(config: Config) -> None:
    """Runs what an earlier run has not, prints and writes the table."""
    odd = [n for n in config.lengths if n % config.chunk or n == config.chunk]
    if odd:
        raise SystemExit(f"--lengths {odd[0]}: lengths are multiples of --chunk {config.chunk}, from twice that on")
    hybrid = ModelConfig.preset(config.preset) if config.preset else SMALL
    lightning = tuple(kind for kind in hybrid.layer_types if kind == LIGHTNING)
    models = {
        "lightning": dataclasses.replace(hybrid, layer_types=lightning),
        "hybrid": hybrid,
        "softmax": dataclasses.replace(hybrid, layer_types=(SOFTMAX,) * hybrid.num_layers),
    }
    rows: list[dict[str, Any]] = json.loads(config.out.read_text())["rows"] if config.out.exists() else []
    for name in config.models:
        model_config = models[name]
        wanted = [n for n in config.lengths if name != "softmax" or n <= config.softmax_until]
        done = {row["tokens"] for row in rows if row["model"] == name}
        if set(wanted) - done:
            measure(name, model_config, wanted, config, rows)
    print(table(rows))


def measure(
    name: str, model_config: ModelConfig, lengths: list[int], config: Config, rows: list[dict[str, Any]]
) -> None:
    """One model through one sequence; adds to the rows and writes them."""
    cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if cpu else jnp.bfloat16
    model = jax.jit(lambda: MiniMaxM1(model_config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))()
    model = prepared(model)
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, max(lengths)).astype(np.int32)

    def run(model: MiniMaxM1, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The likeliest next token, [1], and the memory."""
        logits, cache = model(tokens, cache, last_only=True)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    step = jax.jit(run, donate_argnums=2)
    saved = config.out.with_name(f"{config.out.stem}-{name}.npz")
    cache, position = model.init_cache(1, max(lengths) + DECODED * len(lengths)), 0
    if saved.exists():
        cache, position = restored(saved, cache)
        print(f"{name}: goes on from {position} tokens", flush=True)
    chunks: list[Seconds] = []
    for start in range(position, max(lengths), config.chunk):
        piece = jnp.asarray(tokens[None, start : start + config.chunk])
        taken, (token, cache) = timed(step, model, piece, cache)
        chunks.append(taken)
        seen = start + config.chunk
        if seen in lengths:
            steps: list[Seconds] = []
            for _ in range(DECODED):
                taken, (token, cache) = timed(step, model, token[:, None], cache)
                steps.append(taken)
            row = {
                "model": name,
                "tokens": seen,
                "read": median(chunks[max(1, len(chunks) - READ) :], config.chunk),
                "written": median(steps[2:], 1),  # the first compiles
                "memory_mb": (state_bytes(model_config) + seen * key_value_bytes(model_config, dtype)) / 1e6,
                "process_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
            rows[:] = [old for old in rows if (old["model"], old["tokens"]) != (name, seen)] + [row]
            print(json.dumps(row), flush=True)
            write(config, rows)
        if config.save_every and seen % config.save_every == 0 and seen < max(lengths):
            save(saved, cache, seen)
    saved.unlink(missing_ok=True)


class Seconds(NamedTuple):
    wall: float
    processor: float
    """of all threads of this process: what others do on the machine changes it little"""


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Seconds, Any]:
    wall, processor = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function(*arguments))
    return Seconds(time.perf_counter() - wall, time.process_time() - processor), result


def median(times: Sequence[Seconds], tokens: int) -> dict[str, float]:
    """Milliseconds a token."""
    wall, processor = 1e3 * np.median(times, axis=0) / tokens
    return {"wall_ms": float(wall), "processor_ms": float(processor)}


def save(path: Path, cache: Cache, position: int) -> None:
    arrays: dict[str, np.ndarray] = {f"{number:03}": np.asarray(x) for number, x in enumerate(jax.tree.leaves(cache))}
    temporary = path.with_suffix(".new.npz")
    np.savez(temporary, allow_pickle=False, position=np.array(position), **arrays)
    temporary.replace(path)


def restored(path: Path, cache: Cache) -> tuple[Cache, int]:
    with np.load(path) as saved:
        leaves = [jnp.asarray(saved[name]) for name in sorted(set(saved.files) - {"position"})]
        return jax.tree.unflatten(jax.tree.structure(cache), leaves), int(saved["position"])


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, in Markdown, and how flat lightning is."""
    lines = [
        "| | tokens | read, ms a token | written, ms a token | states, keys and values | process |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        read, written = (f"{row[x]['wall_ms']:.3g} ({row[x]['processor_ms']:.3g})" for x in ("read", "written"))
        memory = f"{row['memory_mb']:.3g} MB | {row['process_gb']:.2g} GB"
        lines.append(f"| {row['model']} | {row['tokens']:,} | {read} | {written} | {memory} |")
    lightning = [row for row in rows if row["model"] == "lightning"]
    for what in ("read", "written"):
        times = [row[what]["processor_ms"] for row in lightning]
        if times:
            lines.append(
                f"\nLightning alone, {what}: the longest time a token is {max(times) / min(times) - 1:.0%} above"
            )
            lines[-1] += " the shortest (processor time)."
    return "\n".join(lines)


def write(config: Config, rows: list[dict[str, Any]]) -> None:
    """JSON, the table and a picture, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    about = {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "model": config.preset or "width 64",
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({**about, "chunk": config.chunk, "rows": rows}, indent=1) + "\n")
    config.out.with_suffix(".md").write_text(table(rows) + "\n")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        tokens = [row["tokens"] for row in mine]
        axes[0].plot(tokens, [row["read"]["wall_ms"] for row in mine], "o-", label=name)
        axes[1].plot(tokens, [row["written"]["wall_ms"] for row in mine], "o-", label=name)
        axes[2].plot(tokens, [row["memory_mb"] for row in mine], "o-", label=name)
    for axis, title in zip(axes, ("read, ms a token", "decoded, ms a token", "states, keys and values, MB")):
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", title=title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(config.out.with_suffix(".png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config))
