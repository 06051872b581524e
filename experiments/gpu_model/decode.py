"""Decoding on one GPU, everything included (embedding, layers, head, sampling): time a step against what memory allows.

    python -m experiments.gpu_model.decode m1-1b:1 m1-1b:64 m1-1b:256 m1-2b:64 --profile

Each case is PRESET:SEQUENCES. bfloat16 parameters; every sequence has seen 128 tokens. The bound is the time to copy
what a step must read and write once, at the copy rate measured in the same process: weights (of experts those in use),
float32 states read and written, keys and values. The last line is everything as JSON.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.gpu_model.update import kernels
from m1jax.compiling import compiler_options
from m1jax.config import ModelConfig
from m1jax.flops import parameters_per_token
from m1jax.inference.sampling import sample
from m1jax.model import MiniMaxM1
from m1jax.model.cache import key_value_bytes, state_bytes

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


def case(preset: str, rows: int, rate: float, profile: bool) -> dict[str, Any]:
    config = ModelConfig.preset(preset)
    model = jax.jit(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))()
    cache = model.init_cache(rows, 512)
    prompts = jax.random.randint(jax.random.key(0), (rows, SEEN), 0, config.vocab_size, jnp.int32)
    keys = jax.random.split(jax.random.key(1), rows)

    @functools.partial(jax.jit, donate_argnums=1)
    def prefill(model: MiniMaxM1, cache: Any) -> Any:
        logits, cache = model(prompts, cache, last_only=True)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def decode(model: MiniMaxM1, token: jax.Array, cache: Any) -> Any:
        def step(i: jax.Array, carry: Any) -> Any:
            token, cache = carry
            logits, cache = model(token[:, None], cache, last_only=True)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            return sample(logits, step_keys, temperature=jnp.ones(rows), top_p=jnp.ones(rows)).tokens, cache

        return jax.lax.fori_loop(0, STEPS, step, (token, cache))[0]

    token, cache = prefill(model, cache)
    begin = time.perf_counter()
    compiled = decode.lower(model, token, cache).compile()
    compiling = time.perf_counter() - begin
    ms = 1e3 * seconds(compiled, model, token, cache) / STEPS
    used = config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** rows)
    weights = 2 * (
        parameters_per_token(config)
        + config.num_layers * (used - config.experts_per_token) * 3 * config.hidden_size * config.intermediate_size
    )
    moved = weights + rows * (2 * state_bytes(config) + (SEEN + STEPS / 2) * key_value_bytes(config, jnp.bfloat16))
    bound = 1e3 * moved / rate
    if profile:
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                jax.block_until_ready(compiled(model, token, cache))
            kernels(Path(directory), f"decode-{preset}-{rows}", compiled.as_text() or "")
    return {
        "case": f"{preset}:{rows}",
        "ms a step": ms,
        "bound ms": bound,
        "reached %": 100 * bound / ms,
        "tokens/s": 1e3 * rows / ms,
        "compile s": compiling,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    rate = copy_rate()
    print(jax.devices()[0].device_kind, "JAX", jax.__version__, f"copies at {rate / 1e12:.2f} TB/s", flush=True)
    rows = []
    for text in arguments.cases:
        preset, count = text.split(":")
        try:
            row = case(preset, int(count), rate, arguments.profile)
        except Exception as error:  # the other cases go on
            row = {"case": text, "failed": f"{type(error).__name__}: {error}"[:1500]}
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
