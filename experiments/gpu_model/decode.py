"""Decoding on GPUs, everything included (embedding, layers, head, sampling): time a step against what memory allows.

    python -m experiments.gpu_model.decode m1-1b:1 m1-1b:64 m1-1b:256 m1-2b:64 --profile
    python -m experiments.gpu_model.decode m1-2b:64 m1-2b:128:data=2 m1-2b:64:tensor=2 m1-2b:64:expert=2

Each case is PRESET:SEQUENCES or, on several cards, PRESET:SEQUENCES:MESH, weights and rows laid out as the engine has
them. bfloat16 parameters; every sequence has seen 128 tokens. The bound is the time to copy what a card must read and
write once in a step, at the copy rate measured in the same process: weights (of experts those in use), float32 states
read and written, keys and values. A case on a mesh is compared with those before it on one card: in tokens per second,
with as many rows a card or in all, and in what it writes greedily for the rows that both have. The last line is
everything as JSON.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from experiments.gpu_model.update import kernels
from m1jax.collectives import collectives, totals
from m1jax.compiling import compiler_options
from m1jax.config import ModelConfig
from m1jax.flops import parameters_per_token
from m1jax.inference.runner import prepared
from m1jax.inference.sampling import sample
from m1jax.model import MiniMaxM1
from m1jax.model.cache import key_value_bytes, state_bytes
from m1jax.sharding import ROWS, parameter_shardings, parse_mesh
from m1jax.train.placement import current_mesh, use_mesh

SEEN, STEPS = 128, 64


def seconds(function: Any, *arguments: Any) -> float:
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def copy_rate() -> float:
    """Bytes per second of a device-to-device copy, read and written bytes counted."""
    x = jnp.ones(2**29, jnp.float32)

    @jax.jit
    def copies(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 10, lambda _, x: x + 1.0, x)

    return 10 * 2 * x.nbytes / seconds(copies, x)


@dataclasses.dataclass(frozen=True)
class Case:
    """So many rows of a model at once, on a mesh (empty: one card)."""

    preset: str
    rows: int
    mesh: str = ""

    @classmethod
    def parse(cls, text: str) -> "Case":
        preset, rows, *mesh = text.split(":")
        return cls(preset, int(rows), *mesh)

    @property
    def sizes(self) -> dict[str, int]:
        return parse_mesh(self.mesh)

    @property
    def cards(self) -> int:
        return math.prod(self.sizes.values())

    def bytes(self, config: ModelConfig) -> float:
        """What a card must read and write in a step."""
        sizes = self.sizes
        rows = self.rows / math.prod(sizes[axis] for axis in ROWS)
        together = rows * sizes["expert"]  # whose experts a card has
        used = config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** together)
        expert = 3 * config.hidden_size * config.intermediate_size * config.num_layers
        others = parameters_per_token(config) - config.experts_per_token * expert
        memory = rows * (2 * state_bytes(config) + (SEEN + STEPS / 2) * key_value_bytes(config, jnp.bfloat16))
        return (2 * (others + used * expert / sizes["expert"]) + memory) / sizes["tensor"]


@dataclasses.dataclass(frozen=True)
class Greedy:
    """What a case writes where the likeliest tokens are taken, from an empty cache on."""

    tokens: np.ndarray
    """[rows, steps]"""
    logp: np.ndarray
    """[rows, steps]"""

    def beside(self, other: "Greedy") -> dict[str, float]:
        """Of the rows that both have: how many first tokens are the same, how long rows go on alike (16-bit weights:
        two close scores may change places, and all that follows), and how far apart log-probabilities are meanwhile."""
        rows = min(len(self.logp), len(other.logp))
        alike = np.cumprod(self.tokens[:rows] == other.tokens[:rows], axis=1)
        apart = np.abs(self.logp[:rows] - other.logp[:rows])
        return {
            "same first token %": 100 * float(alike[:, 0].mean()),
            "same tokens": float(alike.sum(axis=1).mean()),
            "their logp differs by": float((alike * apart).max()),
        }


@functools.cache
def random_model(config: ModelConfig) -> MiniMaxM1:
    return jax.jit(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))()


def measure(case: Case, rate: float, profile: bool) -> tuple[dict[str, Any], Greedy]:
    config, rows = ModelConfig.preset(case.preset), case.rows
    model = random_model(config)
    token = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, rows, np.int32))
    cache, keys = model.init_cache(rows, 512), jax.random.split(jax.random.key(1), rows)
    after = None
    if (mesh := current_mesh()) is not None:
        model = prepared(model)
        model = jax.device_put(model, parameter_shardings(model, mesh, whole=True))
        places = jax.tree.map(functools.partial(NamedSharding, mesh), (PartitionSpec(ROWS), cache.specs()))
        token, cache = jax.device_put((token, cache), places)
        after = *places, NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, compiler_options=compiler_options(), out_shardings=after)
    def decode(model: MiniMaxM1, token: jax.Array, cache: Any, temperature: jax.Array) -> Any:
        def step(i: jax.Array, carry: Any) -> Any:
            token, cache, tokens, logp = carry
            logits, cache = model(token[:, None], cache, last_only=True)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            drawn = sample(logits, step_keys, temperature=temperature, top_p=jnp.ones(rows))
            return drawn.tokens, cache, tokens.at[:, i].set(drawn.tokens), logp.at[:, i].set(drawn.logp)

        nothing = jnp.zeros((rows, STEPS), jnp.int32), jnp.zeros((rows, STEPS))
        return jax.lax.fori_loop(0, STEPS, step, (token, cache, *nothing))

    likeliest, drawing = jnp.zeros(rows), jnp.ones(rows)
    begin = time.perf_counter()
    compiled = decode.lower(model, token, cache, likeliest).compile()
    compiling = time.perf_counter() - begin
    token, cache, *written = compiled(model, token, cache, likeliest)
    for _ in range(SEEN // STEPS - 1):
        token, cache, *_ = compiled(model, token, cache, likeliest)
    ms = 1e3 * seconds(compiled, model, token, cache, drawing) / STEPS
    bound = 1e3 * case.bytes(config) / rate
    if profile:
        name = "-".join(filter(None, ["decode", case.preset, str(rows), case.mesh]))
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                jax.block_until_ready(compiled(model, token, cache, drawing))
            kernels(Path(directory), name, compiled.as_text() or "")
    row: dict[str, Any] = {
        "ms a step": ms,
        "bound ms": bound,
        "reached %": 100 * bound / ms,
        "tokens/s": 1e3 * rows / ms,
        "compile s": compiling,
    }
    if case.mesh:
        found = totals(collectives(compiled))
        row["exchanges a step"] = {kind: (count / STEPS, size / STEPS) for kind, (count, size) in found.items()}
    return row, Greedy(*jax.device_get(written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    rate = copy_rate()
    print(jax.devices()[0].device_kind, "JAX", jax.__version__, f"copies at {rate / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    alone: dict[Case, tuple[float, Greedy]] = {}
    for text in arguments.cases:
        row: dict[str, Any] = {"case": text}
        try:
            case = Case.parse(text)
            with use_mesh(case.mesh, jax.devices()[: case.cards]):
                found, greedy = measure(case, rate, arguments.profile)
            row |= found
            if not case.mesh:
                alone[case] = found["tokens/s"], greedy
            for name, count in (("a card", case.rows // case.cards), ("in all", case.rows)):
                if case.mesh and (one := alone.get(Case(case.preset, count))) is not None:
                    row[f"x one card, as many rows {name}"] = found["tokens/s"] / one[0]
                    row |= greedy.beside(one[1])
        except Exception as error:  # the other cases go on
            row["failed"] = f"{type(error).__name__}: {error}"[:1500]
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
