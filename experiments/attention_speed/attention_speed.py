"""How fast on a GPU are the neighbours of the lightning kernels? Softmax attention and the expert MLP: checks, times.

    python -m experiments.attention_speed.attention_speed --out result.json

Softmax attention: cuDNN beside the portable form in blocks of several sizes, 64 query and 8 key/value heads of 128,
bfloat16, forward and forward + backward; packed rows too, which cuDNN does not take. Expert MLP: 32 experts, 2 a token,
hidden 6144, beside dense products of as many FLOP.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import expert_mlp, softmax_attention
from pallas_kernels.softmax import blocked

HEADS, KV_HEADS, SIZE = 64, 8, 128
BLOCKS = ((512, 512), (2048, 512), (4096, 1024), (8192, 2048))
"""Rows of queries (heads of a group counted) and keys of a block."""


def milliseconds(function, *arguments):
    """Median of five batches of calls, each enqueued at once and waited for once."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(50, int(0.1 / (time.perf_counter() - start))))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls - 1):
            function(*arguments)
        jax.block_until_ready(function(*arguments))
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def normal(seed, *shape, dtype=jnp.bfloat16, scale=1.0):
    make = jax.jit(lambda key: (scale * jax.random.normal(key, shape)).astype(dtype))
    return make(jax.random.key(seed))


def with_gradients(function, do):
    def both(*arrays):
        o, transposed = jax.vjp(function, *arrays)
        return o, *transposed(do)

    return jax.jit(both)


def relative_rms(result, truth):
    result, truth = (np.asarray(x, np.float64) for x in (result, truth))
    return float(np.sqrt(np.square(result - truth).mean() / np.square(truth).mean()))


def attention_inputs(length, heads=HEADS, kv_heads=KV_HEADS):
    return [normal(i, 1, length, n, SIZE) for i, n in enumerate((heads, kv_heads, kv_heads, heads))]


def measure_attention(add, lengths):
    q, k, v, do = attention_inputs(2048, 8, 1)
    truths = with_gradients(functools.partial(softmax_attention, implementation="reference"), do)(q, k, v)
    for name in ("cudnn", "blocked"):
        results = with_gradients(functools.partial(softmax_attention, implementation=name), do)(q, k, v)
        errors = [relative_rms(*pair) for pair in zip(results, truths, strict=True)]
        add(what="attention error", implementation=name, **dict(zip(("o", "dq", "dk", "dv"), errors, strict=True)))
    for length in lengths:
        q, k, v, do = attention_inputs(length)
        ids = jnp.asarray(np.arange(length)[None] // (length // 8), jnp.int32)
        forms = [("cudnn", None, None), *(("blocked", sizes, None) for sizes in BLOCKS)]
        forms += [("blocked", sizes, ids) for sizes in BLOCKS]
        for name, sizes, segment_ids in forms:
            if sizes is not None:
                blocked.GPU_Q_ROWS, blocked.GPU_K_BLOCK = sizes
                jax.clear_caches()
            what = dict(implementation=name, blocks=sizes, segments=1 if segment_ids is None else 8, tokens=length)
            op = functools.partial(softmax_attention, segment_ids=segment_ids, implementation=name)
            flop = 4 * HEADS * SIZE * length**2 / 2 / what["segments"]
            for direction, factor, function in (("forward", 1, jax.jit(op)), ("both", 3.5, with_gradients(op, do))):
                try:
                    ms = milliseconds(function, q, k, v)
                    add(what="attention", **what, direction=direction, ms=ms, tflop_per_s=factor * flop / ms * 1e-9)
                except Exception as error:
                    add(what="attention", **what, direction=direction, failed=str(error)[:200])


def measure_experts(add, tokens, hidden, inner, experts, chosen=2):
    """Errors against the oracle at a small size, then times at the size given."""
    rng = np.random.default_rng(0)

    def inputs(tokens, hidden, inner, experts):
        x = normal(0, tokens, hidden)
        w1, w3 = (normal(i, experts, inner, hidden, scale=hidden**-0.5) for i in (1, 2))
        w2 = normal(3, experts, hidden, inner, scale=inner**-0.5)
        routes = np.stack([rng.permutation(experts)[:chosen] for _ in range(tokens)])
        weights = normal(5, tokens, chosen, scale=0.1) + 0.5
        return (x, w1, w3, w2, weights), jnp.asarray(routes, jnp.int32)

    def op(name, routes):
        def function(x, w1, w3, w2, weights):
            return expert_mlp(x, w1, w3, w2, routes, weights, implementation=name)

        return function

    arrays, routes = inputs(2500, 256, 384, 4)  # Small: the oracle computes every expert for every token.
    do = normal(4, 2500, 256)
    truths = with_gradients(op("reference", routes), do)(*arrays)
    for name in ("ragged", "hopper"):
        results = with_gradients(op(name, routes), do)(*arrays)
        errors = (relative_rms(*pair) for pair in zip(results, truths, strict=True))
        names = ("y", "dx", "dw1", "dw3", "dw2", "dweights")
        add(what="experts error", implementation=name, **dict(zip(names, errors, strict=True)))
    arrays, routes = inputs(tokens, hidden, inner, experts)
    flop = 6 * tokens * chosen * hidden * inner
    what = dict(what="experts", tokens=tokens, experts=experts, hidden=hidden, inner=inner)

    def dense(x, w1, w3, w2, weights):
        """Each expert an equal share of the rows, in order: products alone."""
        rows = jnp.repeat(x, chosen, 0).reshape(experts, -1, hidden)
        inside = jax.nn.silu(jnp.einsum("end,efd->enf", rows, w1)) * jnp.einsum("end,efd->enf", rows, w3)
        return jnp.einsum("enf,edf->end", inside, w2).reshape(tokens, chosen, hidden).sum(1)

    do = normal(4, tokens, hidden)
    for name, function in (("hopper", op("hopper", routes)), ("dense", dense), ("ragged", op("ragged", routes))):
        for direction, factor, timed in (("forward", 1, jax.jit(function)), ("both", 3, with_gradients(function, do))):
            try:
                ms = milliseconds(timed, *arrays)
                add(**what, implementation=name, direction=direction, ms=ms, tflop_per_s=factor * flop / ms * 1e-9)
            except Exception as error:
                add(**what, implementation=name, direction=direction, failed=str(error)[:200])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = [{"what": "device", "name": jax.devices()[0].device_kind, "jax": jax.__version__}]

    def add(**row):
        rows.append(row)
        out.write_text(json.dumps(rows, indent=1))  # As it comes: what runs out of time loses only itself.
        print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    # One of M1's layers has 10.9 GB of experts; with gradients half of them fit beside everything else.
    for tokens in (64, 1024, 16384):
        measure_experts(add, tokens, hidden=6144, inner=9216, experts=16)
    measure_attention(add, lengths=(4096, 8192, 16384, 32768))


if __name__ == "__main__":
    main()
