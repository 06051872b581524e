"""The whole model on CPU against Transformers' native `minimax` in PyTorch: same weights, same process, same threads.

Checks first that both give the same logits, then times forward, forward + backward and decode steps (best of several,
the two taken in turn), and compares decoding with the time that reading the weights takes. Run:
    python -m experiments.cpu_speed.cpu_speed
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, save_pretrained

HERE = Path(__file__).parent
MAIN = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=768,
    layer_types=("lightning",) * 7 + ("softmax",),
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    rotary_dim=64,  # all channels: Transformers knows no other
    num_experts=8,
    experts_per_token=2,
)
MANY_EXPERTS = dataclasses.replace(MAIN, num_experts=32)
SMALL = dataclasses.replace(MAIN, vocab_size=512, hidden_size=96, intermediate_size=128, head_dim=16, rotary_dim=16)
CONTEXT = 128  # tokens in the cache when decoding begins
STEPS = 16  # decode steps that are timed together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and where to write it."""

    out: Path = HERE / "result.json"
    """JSON with every figure; the table and the picture are written beside it."""
    threads: int = 2
    """PyTorch's threads. XLA takes a thread per core it may use: `taskset -c 0,1` for two."""
    repeat: int = 5
    """Timings of each thing; the smallest counts, the median is kept beside it."""
    parts: tuple[str, ...] = ("forward", "train", "decode", "small", "experts")
    """Which measurements to run; the others keep the figures of an earlier run of the same file."""
    theirs: bool = True
    """Time Transformers too."""


def main(config: Config) -> None:
    """Runs the chosen parts, prints and writes the table."""
    rows: dict[str, dict[str, Any]] = {}
    if config.out.exists():
        rows = {row["what"]: row for row in json.loads(config.out.read_text())["rows"]}
    bandwidth = read_bandwidth(config.repeat)
    print(f"reads {bandwidth / 1e9:.1f} GB/s", flush=True)
    main_pair = Pair(MAIN, config) if {"forward", "train", "decode"} & set(config.parts) else None

    def add(what: str, ours: Timing, theirs: Timing | None, goal: float | None, **more: Any) -> None:
        old = rows.get(what, {})
        row = {"what": what, "ours_s": ours.best, "ours_median_s": ours.median, "theirs_s": old.get("theirs_s")}
        if theirs is not None:
            row |= {"theirs_s": theirs.best, "theirs_median_s": theirs.median}
        if row["theirs_s"] is not None:
            row["speedup"] = row["theirs_s"] / row["ours_s"]
        rows[what] = row | {"goal": goal} | more
        print(line(rows[what]), flush=True)

    if main_pair is not None and "forward" in config.parts:
        for length in (2048, 8192):
            add(f"forward {length}", *main_pair.forward(length), 2.0)
    if main_pair is not None and "train" in config.parts:
        add("forward + backward 2048", *main_pair.train(2048), 2.0)
    if main_pair is not None and "decode" in config.parts:
        for batch in (1, 8, 64):
            bound = decode_bytes(MAIN, batch) / bandwidth
            add(f"decode {batch}", *main_pair.decode(batch), 2.0, bound_s=bound)
    if "small" in config.parts:
        small = Pair(SMALL, config)
        for batch in (1, 8, 64):
            add(f"decode {batch}, hidden 96", *small.decode(batch), 3.0 if batch == 64 else None)
    if "experts" in config.parts:
        few = main_pair or Pair(MAIN, dataclasses.replace(config, theirs=False))
        many = Pair(MANY_EXPERTS, dataclasses.replace(config, theirs=False))
        times = [one.forward(2048)[0] for _ in range(2) for one in (few, many)]
        eight, thirty_two = (min(times[i::2], key=lambda t: t.best) for i in range(2))
        add("forward 2048, 32 experts", thirty_two, None, None, over_8_experts=thirty_two.best / eight.best)
    write(config, list(rows.values()), bandwidth)


@dataclasses.dataclass(frozen=True)
class Timing:
    best: float
    median: float


class Pair:
    """One set of weights in both frameworks."""

    def __init__(self, model_config: ModelConfig, config: Config) -> None:
        self.config, self.repeat = model_config, config.repeat
        self.ours = MiniMaxM1(model_config, rngs=nnx.Rngs(0))
        self.graph, self.parameters = nnx.split(self.ours)
        self.theirs = None
        if not config.theirs:
            return
        import torch
        import transformers

        torch.set_num_threads(config.threads)
        with tempfile.TemporaryDirectory() as directory:
            save_pretrained(self.ours, Path(directory) / "hf", layout="transformers")
            self.theirs = transformers.AutoModelForCausalLM.from_pretrained(
                Path(directory) / "hf", dtype=torch.float32
            ).eval()
        tokens = self._tokens(2, 300)
        with torch.no_grad():
            difference = np.abs(np.asarray(self.ours(tokens)) - self.theirs(self._torch(tokens)).logits.numpy()).max()
        if difference > 1e-3:
            raise SystemExit(f"the two models differ by {difference:.1e}: nothing to compare")

    def _tokens(self, batch: int, length: int) -> jax.Array:
        rng = np.random.default_rng(0)
        return jnp.asarray(rng.integers(0, self.config.vocab_size, (batch, length)), jnp.int32)

    @staticmethod
    def _torch(tokens: jax.Array) -> Any:
        import torch

        return torch.tensor(np.asarray(tokens), dtype=torch.long)

    def _both(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[Timing, Timing | None]:
        calls = [lambda: jax.block_until_ready(ours())] + ([] if self.theirs is None else [theirs])
        seconds: list[list[float]] = [[] for _ in calls]
        for turn in range(self.repeat + 1):
            for call, kept in zip(calls, seconds):
                begin = time.perf_counter()
                call()
                if turn:  # the first compiles and warms up
                    kept.append(time.perf_counter() - begin)
        timings = [Timing(min(s), statistics.median(s)) for s in seconds]
        return timings[0], (timings[1] if len(timings) == 2 else None)

    def forward(self, length: int) -> tuple[Timing, Timing | None]:
        """Logits of one sequence."""
        tokens = self._tokens(1, length)
        call = jax.jit(lambda parameters, tokens: nnx.merge(self.graph, parameters)(tokens))
        torch_tokens = self._torch(tokens) if self.theirs is not None else None

        def theirs() -> None:
            import torch

            assert self.theirs is not None
            with torch.no_grad():
                self.theirs(torch_tokens)

        return self._both(lambda: call(self.parameters, tokens), theirs)

    def train(self, length: int) -> tuple[Timing, Timing | None]:
        """Mean cross-entropy of the next token of one sequence and its gradient for every parameter."""
        tokens = self._tokens(1, length + 1)

        def loss(parameters: Any, tokens: jax.Array) -> jax.Array:
            model = nnx.merge(self.graph, parameters)
            hidden = model.forward(tokens[:, :-1]).hidden
            return -jnp.mean(model.log_probs(hidden, tokens[:, 1:])[0])

        call = jax.jit(jax.value_and_grad(loss))
        torch_tokens = self._torch(tokens) if self.theirs is not None else None

        def theirs() -> None:
            import torch

            assert self.theirs is not None and torch_tokens is not None
            self.theirs.zero_grad(set_to_none=True)
            logits = self.theirs(torch_tokens[:, :-1]).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch_tokens[:, 1:].flatten()).backward()

        timings = self._both(lambda: call(self.parameters, tokens), theirs)
        if self.theirs is not None:
            self.theirs.zero_grad(set_to_none=True)
        return timings

    def decode(self, batch: int) -> tuple[Timing, Timing | None]:
        """One step: a token for each of `batch` rows whose cache holds `CONTEXT` tokens; greedy choice included. Our
        weights are as the engine has them."""
        tokens = self._tokens(batch, CONTEXT)
        graph, parameters = nnx.split(self.ours.unstacked())

        def step(parameters: Any, token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            logits, cache = nnx.merge(graph, parameters)(token[:, None], cache, last_only=True)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        jitted = jax.jit(step, donate_argnums=2)
        length = CONTEXT + STEPS * (self.repeat + 2)
        logits, cache = self.ours(tokens, self.ours.init_cache(batch, length), last_only=True)
        state = [jnp.argmax(logits, axis=-1).astype(jnp.int32), cache]

        def ours() -> Any:
            for _ in range(STEPS):
                state[:] = jitted(parameters, state[0], state[1])
            return state

        their_state: list[Any] = []
        if self.theirs is not None:
            import torch

            with torch.no_grad():
                out = self.theirs(self._torch(tokens), use_cache=True)
            their_state = [out.logits[:, -1:].argmax(-1), out.past_key_values]

        def theirs() -> None:
            import torch

            assert self.theirs is not None
            with torch.no_grad():
                for _ in range(STEPS):
                    out = self.theirs(their_state[0], past_key_values=their_state[1], use_cache=True)
                    their_state[:] = [out.logits[:, -1:].argmax(-1), out.past_key_values]

        both = self._both(ours, theirs)
        ours_t, theirs_t = (t and Timing(t.best / STEPS, t.median / STEPS) for t in both)
        assert ours_t is not None
        return ours_t, theirs_t


def read_bandwidth(repeat: int) -> float:
    """Bytes per second at which XLA reads arrays far larger than the caches of a core (their sum is computed)."""
    arrays = [jnp.ones((2**20 * 8,), jnp.float32) for _ in range(12)]  # 400 MB
    total = jax.jit(lambda arrays: [jnp.sum(a) for a in arrays])
    jax.block_until_ready(total(arrays))
    best = float("inf")
    for _ in range(repeat * 3):
        begin = time.perf_counter()
        jax.block_until_ready(total(arrays))
        best = min(best, time.perf_counter() - begin)
    return sum(a.nbytes for a in arrays) / best


def decode_bytes(c: ModelConfig, batch: int) -> float:
    """What one step must move: weights in use (as many experts as random routes touch), states both ways, the cache."""
    inner, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    softmax = sum(kind == "softmax" for kind in c.layer_types)
    lightning = c.num_layers - softmax
    touched = c.num_experts * (1 - (1 - c.experts_per_token / c.num_experts) ** batch)
    weights = (
        c.num_layers * (touched * 3 * c.hidden_size * c.intermediate_size + c.num_experts * c.hidden_size)
        + lightning * 5 * c.hidden_size * inner
        + softmax * c.hidden_size * (2 * inner + 2 * kv)
        + c.vocab_size * c.hidden_size
    )
    states = 2 * batch * lightning * inner * c.head_dim
    cache = 2 * batch * softmax * kv * (CONTEXT + STEPS)
    return 4 * (weights + states + cache)


def line(row: dict[str, Any]) -> str:
    """One row of the table in Markdown."""

    def ms(value: float | None) -> str:
        return "" if value is None else f"{value * 1e3:.1f} ms"

    speedup = f"{row['speedup']:.1f}x" if row.get("speedup") else ""
    goal = f">= {row['goal']:.0f}x" if row.get("goal") else ""
    note = f"{row['bound_s'] / row['ours_s']:.0%} of the bandwidth bound" if row.get("bound_s") else ""
    if row.get("over_8_experts"):
        note = f"{row['over_8_experts']:.2f}x the time with 8 experts (goal <= 1.3x)"
    return f"| {row['what']} | {ms(row['ours_s'])} | {ms(row['theirs_s'])} | {speedup} | {goal} | {note} |"


def write(config: Config, rows: list[dict[str, Any]], bandwidth: float) -> None:
    """JSON, the table (Markdown) and a picture, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    head = "| float32, 2 threads | m1jax | Transformers | speed-up | goal | |\n|---|---|---|---|---|---|"
    table = "\n".join([head, *(line(row) for row in rows)])
    print(table)
    versions = {"jax": jax.__version__, "cores": os.cpu_count(), "read_bandwidth_gb_s": bandwidth / 1e9}
    config.out.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")
    config.out.with_suffix(".md").write_text(table + "\n")
    both = [row for row in rows if row.get("speedup")]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(both) + 1.2))
    labels = [row["what"] for row in both]
    axes.barh(labels, [row["speedup"] for row in both], color="#4477aa")
    axes.axvline(1, color="#888888", linewidth=1)
    for at, row in enumerate(both):
        if row.get("goal"):
            axes.plot([row["goal"]] * 2, [at - 0.4, at + 0.4], color="#cc3311", linewidth=2)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as Transformers (red: the goal)")
    figure.tight_layout()
    figure.savefig(config.out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Config))
