"""Does a hybrid that has seen at most 4,096 tokens find values at 65,536 and beyond?

    python -m experiments.long_context.retrieval                                      one GPU: minutes
    python -m experiments.long_context.retrieval --steps 3 --row 512 --rows 2 --lengths 256 512 --evaluated 2 --seeds 0

A sequence is filler with 8 pairs of a key and a value at random places, and at its end the 8 keys in another order,
each before its pair. A pair is one token, keys and filler are others, drawn anew for every sequence. The model (a
lightning layer and one of softmax attention) is trained to write the pairs at the end, by the trainer of this package,
on sequences of 64 to 4,096 tokens, and read at every length in chunks of 1,024 tokens through its cache.

What was trained is kept in `runs`, what was measured is written at once: started again, the program goes on from there.
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
from jaxtyping import Array, Int, Int32

from m1jax import MiniMaxM1, ModelConfig
from m1jax.config import LIGHTNING, SOFTMAX
from m1jax.model import Cache, head
from m1jax.train.batch import Batch
from m1jax.train.loop import LoopRecipe, fit
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run

HERE = Path(__file__).parent
KEYS, VALUES, FILLER = range(16), range(16), range(16, 32)
FIRST_PAIR = 32
"""The token of key k and value v is this + 16 k + v."""
PAIRS, TRAINED_PAIRS = 8, (2, 4, 8)
CHUNK = 1024
MODEL = ModelConfig(
    vocab_size=FIRST_PAIR + len(KEYS) * len(VALUES),
    hidden_size=64,
    intermediate_size=64,
    layer_types=(LIGHTNING, SOFTMAX),
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    rotary_dim=8,
    num_experts=1,
    experts_per_token=1,
    initializer_range=0.1,
    # DeepNorm's (2 L)^(1/4) at L = 2 layers, as M1's alpha is at 80.
    lightning_alpha=4**0.25,
    softmax_alpha=4**0.25,
    mlp_alpha=4**0.25,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and where to write it."""

    out: Path = HERE / "retrieval.json"
    """JSON with every figure; the table and the picture are written beside it."""
    runs: Path = Path("runs/retrieval")
    """Checkpoints."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and data."""
    steps: int = 2000
    """Updates."""
    learning_rate: float = 1e-2
    """At its peak."""
    row: int = 4096
    """Tokens of a training row, and of the longest sequence trained on."""
    rows: int = 4
    """Of an update."""
    lengths: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536, 131_072)
    """At which to measure."""
    evaluated: int = 32
    """Sequences at each length, of 8 values each."""


def main(config: Config) -> None:
    """Trains and measures what an earlier run has not, prints and writes the table."""
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 on a GPU too: all is small
    found: list[dict[str, Any]] = json.loads(config.out.read_text())["found"] if config.out.exists() else []
    for seed in config.seeds:
        missing = [n for n in config.lengths if (seed, n) not in {(x["seed"], x["tokens"]) for x in found}]
        if not missing:
            continue
        model = trained(config, seed)
        read = reader(model, max(config.lengths))
        for length in missing:
            rng = np.random.default_rng((seed, length))
            right = read(sequences(rng, config.evaluated, length))
            about = {"seed": seed, "learning_rate": config.learning_rate, "tokens": length}
            found.append({**about, "right": int(right.sum()), "of": right.size})
            print(json.dumps(found[-1]), flush=True)
            write(config, found)
    print(table(found))


def sequences(
    rng: np.random.Generator, count: int, length: int, pairs: int = PAIRS
) -> Int32[np.ndarray, "count length"]:
    """Filler with so many pairs in it, and the pairs again."""
    context = length - 2 * pairs
    tokens = rng.choice(FILLER, (count, length)).astype(np.int32)
    keys = rng.permuted(np.tile(KEYS, (count, 1)), axis=1)[:, :pairs]
    both = FIRST_PAIR + len(VALUES) * keys + rng.choice(VALUES, (count, pairs))
    at = np.argsort(rng.random((count, context)), axis=1)[:, :pairs]
    np.put_along_axis(tokens, at, both, axis=1)
    tokens[:, context:] = np.stack([keys, both], axis=-1).reshape(count, -1)
    return tokens


class Batches:
    """Rows full of sequences of equal length; update n is always the same.

    A row's length is drawn from the powers of two from 64 on, up to one that stays there for two fifths of the updates
    and grows over two more. Its sequences have 2, 4 or 8 pairs: the fewer there are, the more a right choice gains.
    """

    def __init__(self, config: Config, seed: int) -> None:
        self._config, self._seed, self._update = config, seed, 0
        self._lengths = [n for n in (64 * 2**i for i in range(16)) if n <= config.row]

    def __next__(self) -> Batch:
        rng = np.random.default_rng((self._seed, 1, self._update))
        rows, time = self._config.rows, self._config.row
        grown = max(0.0, (self._update / self._config.steps - 0.4) / 0.4)
        self._update += 1
        batch = Batch.padding((1, rows, time))
        for row, length in enumerate(rng.choice(self._lengths[: 1 + int(grown * len(self._lengths))], rows)):
            pairs = int(rng.choice(TRAINED_PAIRS))
            tokens = sequences(rng, time // length, length, pairs).reshape(-1)
            place = np.arange(time) % length
            asked = (place >= length - 2 * pairs) & (place % 2 == 0)  # a key at the end: its value comes next
            for name, values in (
                ("tokens", tokens),
                ("targets", np.roll(tokens, -1)),
                ("segment_ids", np.arange(time) // length),
                ("mask", asked),
                ("weight", asked / np.sum(asked)),  # long sequences, of which a row has few, count as much
            ):
                getattr(batch, name)[0, row] = values
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"update": self._update}

    def set_state(self, state: dict[str, Any]) -> None:
        self._update = state["update"]

    def close(self) -> None:
        pass


def trained(config: Config, seed: int) -> MiniMaxM1:
    model = jax.jit(lambda: MiniMaxM1(MODEL, rngs=nnx.Rngs(seed), dtype=jnp.float32))()
    recipe = LoopRecipe(
        optimizer=OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=200, final_fraction=0.1),
        steps=config.steps,
        checkpoint_every=1000,
        log_every=50,
    )
    settings = {"recipe": recipe, "seed": seed, "row": config.row, "rows": config.rows, "lengths": "growing"}
    run = Run(config.runs / f"seed{seed}", settings)
    try:
        return fit(run, model, Batches(config, seed), recipe, phase="retrieval")
    finally:
        run.close()


def reader(model: MiniMaxM1, longest: int) -> Callable[[Int32[np.ndarray, "rows length"]], np.ndarray]:
    """A function that reads whole sequences and says which values were the likeliest tokens, bool [rows, PAIRS]."""

    def read(
        model: MiniMaxM1, tokens: Int[Array, "rows chunk"], cache: Cache
    ) -> tuple[Int[Array, "rows asked"], Cache]:
        out = model.forward(tokens, cache)
        assert out.cache is not None
        asked = head.logits(out.hidden[:, -2 * PAIRS :], model.lm_head[...])[:, ::2]
        return jnp.argmax(asked, axis=-1), out.cache

    program = jax.jit(read, donate_argnums=2)

    def right(tokens: Int32[np.ndarray, "rows length"]) -> np.ndarray:
        rows, length = tokens.shape
        cache = model.init_cache(rows, longest)
        written = None
        for start in range(0, length, CHUNK):
            written, cache = program(model, jnp.asarray(tokens[:, start : start + CHUNK]), cache)
        return np.asarray(written) == tokens[:, length - 2 * PAIRS + 1 :: 2]

    return right


def table(found: list[dict[str, Any]]) -> str:
    """Shares of values found, in Markdown."""
    seeds = sorted({x["seed"] for x in found})
    lines = ["| tokens | mean |" + "".join(f" seed {seed} |" for seed in seeds), "|---|---|" + "---|" * len(seeds)]
    for length in sorted({x["tokens"] for x in found}):
        shares = {x["seed"]: x["right"] / x["of"] for x in found if x["tokens"] == length}
        each = "".join(f" {shares[seed]:.1%} |" if seed in shares else " |" for seed in seeds)
        lines.append(f"| {length:,} | {np.mean(list(shares.values())):.1%} |{each}")
    return "\n".join(lines)


def write(config: Config, found: list[dict[str, Any]]) -> None:
    """JSON, the table and a picture, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "steps": config.steps, "row": config.row}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({**about, "found": found}, indent=1) + "\n")
    config.out.with_suffix(".md").write_text(table(found) + "\n")
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for seed in sorted({x["seed"] for x in found}):
        mine = sorted((x["tokens"], x["right"] / x["of"]) for x in found if x["seed"] == seed)
        axes.plot(*zip(*mine), "o-", label=f"seed {seed}")
    axes.axvline(config.row, color="grey", linestyle=":", label="longest trained on")
    axes.axhline(1 / len(VALUES), color="grey", linewidth=0.5)
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="tokens of context", ylabel="values found")
    axes.legend()
    figure.tight_layout()
    figure.savefig(config.out.with_suffix(".png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config))
