"""Is the head on matrix units as accurate as float32, and what does it cost? On a GPU, beside the products it replaces.

    python -m experiments.gpu_model.check_head [times] [decode] [errors]

Vocabulary 32,768, hidden 2048. Errors against float64 of 512 tokens; times of 8 x 4096 tokens; logits of a decode step.
The last line is everything as JSON.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.model import head
from pallas_kernels import vocabulary_scores, vocabulary_statistics
from pallas_kernels.vocabulary import hopper
from pallas_kernels.vocabulary.split import SCALE, split

WIDTH, WORDS, TOKENS = 2048, 32768, 8 * 4096
rows: list[dict[str, object]] = []


def report(what: str, measure: Callable[[], dict[str, float]]) -> None:
    """Adds what `measure` finds, or why it failed, and prints it."""
    try:
        row: dict[str, object] = {"what": what, **measure()}
    except Exception as error:  # the other measurements go on
        row = {"what": what, "failed": f"{type(error).__name__}: {error}"[:300]}
    rows.append(row)
    print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def milliseconds(function: Callable[..., object], *arguments: object) -> float:
    """Median of five batches of calls, each enqueued at once and waited for once."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(100, int(0.1 / (time.perf_counter() - start))))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls - 1):
            function(*arguments)
        jax.block_until_ready(function(*arguments))
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


@functools.partial(jax.jit, static_argnums=(0, 1))
def problem(tokens: int, spread: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden, lm_head and targets whose scores have that standard deviation."""
    keys = jax.random.split(jax.random.key(time.time_ns() % 2**31), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, WIDTH)).astype(jnp.bfloat16)
    lm_head = jax.random.normal(keys[1], (WORDS, WIDTH)) * spread * WIDTH**-0.5
    return hidden, lm_head, jax.random.randint(keys[2], (1, tokens), 0, WORDS)


def through(product: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(log-probability, entropy) from another product, all logits at once."""

    @jax.jit
    def log_probs(hidden: jax.Array, lm_head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = jax.nn.log_softmax(product(hidden, lm_head))
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], entropy

    return log_probs


def highest(hidden: jax.Array, lm_head: jax.Array) -> jax.Array:
    return jnp.einsum("...i,vi->...v", hidden.astype(jnp.float32), lm_head, precision="highest")


def preset(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    algorithm = jax.lax.DotAlgorithmPreset[name]
    return lambda hidden, lm_head: jnp.einsum(
        "...i,vi->...v", hidden.astype(jnp.float32), lm_head, precision=algorithm, preferred_element_type=jnp.float32
    )


def errors(spread: float) -> None:
    hidden, lm_head, targets = problem(512, spread)
    scores = np.asarray(hidden[0], np.float64) @ np.asarray(lm_head, np.float64).T
    top = scores.max(-1, keepdims=True)
    log_p = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    best = jnp.asarray(scores.argmax(-1), jnp.int32)[None]

    def against(function: Callable[..., tuple[jax.Array, jax.Array]]) -> dict[str, float]:
        found = {}
        for name, words in (("random", targets), ("best", best)):
            log_prob, ent = function(hidden, lm_head, words)
            wrong = (
                np.asarray(log_prob[0], np.float64) - np.take_along_axis(log_p, np.asarray(words[0])[:, None], 1)[:, 0]
            )
            found[f"{name}_max"], found[f"{name}_rms"] = float(abs(wrong).max()), float(np.sqrt((wrong**2).mean()))
        found["entropy_max"] = float(abs(np.asarray(ent[0], np.float64) - entropy).max())
        return found

    def statistics(implementation: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
        @jax.jit
        def log_probs(hidden: jax.Array, lm_head: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
            found, _ = vocabulary_statistics(hidden[0], lm_head, words[0], implementation=implementation)
            normaliser = found.top + jnp.log(found.mass)
            return (found.chosen - normaliser)[None], (normaliser - found.weighted / found.mass)[None]

        return log_probs

    forms = {
        "ours": jax.jit(head.log_probs),
        "float32 (highest)": statistics("reference"),
        "float16 x 2 in XLA": statistics("xla"),
        "BF16_BF16_F32_X6": through(preset("BF16_BF16_F32_X6")),
    }
    for name, form in forms.items():
        report(f"error, scores of {spread}: {name}", functools.partial(against, form))


def gradients(spread: float) -> dict[str, float]:
    hidden, lm_head, targets = problem(4096, spread)
    g, e = jax.random.normal(jax.random.key(3), (2, 1, 4096)) * 1e-5

    @jax.jit
    def pulled(hidden: jax.Array, lm_head: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda h, w: head.log_probs(h, w, targets), hidden, lm_head)[1]((g, e))

    ours = pulled(hidden, lm_head)
    truth = pulled(hidden.astype(jnp.float32), lm_head)
    return {
        name: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for name, a, b in zip(("d_hidden", "d_lm_head"), ours, truth, strict=True)
    }


def times() -> None:
    hidden, lm_head, targets = problem(TOKENS, 1.0)
    flop = 2 * TOKENS * WIDTH * WORDS

    def timed(function: Callable[..., object], *arguments: object, products: float) -> dict[str, float]:
        ms = milliseconds(function, *arguments)
        return {"ms": ms, "tflop_per_s": products * flop / ms * 1e-9}

    @jax.jit
    def pulled(hidden: jax.Array, lm_head: jax.Array) -> tuple[jax.Array, jax.Array]:
        (log_prob, entropy), transposed = jax.vjp(lambda h, w: head.log_probs(h, w, targets), hidden, lm_head)
        return transposed((log_prob, entropy))

    exact = hidden.astype(jnp.float32)
    forward = jax.jit(head.log_probs)
    report("ours, forward", lambda: timed(forward, hidden, lm_head, targets, products=2))
    report("ours, forward + backward", lambda: timed(pulled, hidden, lm_head, products=5))

    def statistics(tokens: int, implementation: str) -> dict[str, float]:
        function = jax.jit(functools.partial(vocabulary_statistics, implementation=implementation))
        ms = milliseconds(function, hidden[0, :tokens], lm_head, targets[0, :tokens])
        return {"ms": ms, "tflop_per_s": 2 * flop * tokens / TOKENS / ms * 1e-9}

    for tokens in (TOKENS, 4096, 512):
        for name in ("hopper", "xla"):
            report(f"statistics of {tokens} tokens, {name}", functools.partial(statistics, tokens, name))
    kept = hopper.GROUP, hopper.PARTS
    for group, parts in ((256, 8), (2048, 8), (128, 4), (128, 16)):
        hopper.GROUP, hopper.PARTS = group, parts
        report(f"hopper, group {group}, parts {parts}", functools.partial(statistics, TOKENS, "hopper"))
    hopper.GROUP, hopper.PARTS = kept
    report("splitting the weight", lambda: {"ms": milliseconds(jax.jit(split), lm_head)})
    report("float32, forward", lambda: timed(forward, exact, lm_head, targets, products=1))
    report("float32, forward + backward", lambda: timed(pulled, exact, lm_head, products=4))


def decode() -> None:
    _, lm_head, _ = problem(1, 1.0)
    together = jnp.concatenate(split(lm_head)[::-1], axis=-1)

    def prepared(hidden: jax.Array, together: jax.Array) -> jax.Array:
        twice = jnp.concatenate([hidden.astype(together.dtype)] * 2, axis=-1)
        return jnp.einsum("ti,vi->tv", twice, together, preferred_element_type=jnp.float32) / SCALE

    for count in (1, 64, 256, 1024):
        hidden = jax.random.normal(jax.random.key(0), (count, WIDTH)).astype(jnp.bfloat16)
        forms: dict[str, tuple[Callable[..., jax.Array], jax.Array]] = {
            "ours": (head.logits, lm_head),
            "highest": (highest, lm_head),
            "hopper": (functools.partial(vocabulary_scores, implementation="hopper"), lm_head),
            "BF16_BF16_F32_X6": (preset("BF16_BF16_F32_X6"), lm_head),
            "parts made beforehand": (prepared, together),
        }
        for name, (form, weight) in forms.items():

            def measure(form=form, weight=weight, hidden=hidden) -> dict[str, float]:
                truth = np.asarray(hidden[:16], np.float64) @ np.asarray(lm_head[:4096], np.float64).T
                error = np.abs(np.asarray(jax.jit(form)(hidden, weight)[:16, :4096], np.float64) - truth).max()
                ms = milliseconds(jax.jit(form), hidden, weight)
                return {"ms": ms, "gb_per_s": 4 * WIDTH * WORDS / ms * 1e-6, "error_max": float(error)}

            report(f"logits of {count} rows: {name}", measure)


def main() -> None:
    wanted = sys.argv[1:] or ["times", "decode", "errors"]
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    if "times" in wanted:
        times()
    if "decode" in wanted:
        decode()
    if "errors" in wanted:
        for spread in (1.0, 3.0):
            errors(spread)
            report(f"gradient error, scores of {spread}", functools.partial(gradients, spread))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
