"""The kernels for decoding on a Hopper GPU: right on fresh random inputs, and how near they come to the copy rate.

    python experiments/gpu_model/check_decode.py [--seconds 90] [--only experts,routes,project,attention,states,ring]

Prints a line per case, then one line of JSON. Times are wall clock per call inside one compiled loop.
"""

import argparse
import functools
import json
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from m1jax.compiling import compiler_options
from pallas_kernels import Projection
from pallas_kernels.experts import hopper_few

BEGUN = time.perf_counter()
REPEATS = 20


def random(seed, shape, scale=1.0, dtype="bfloat16"):
    """Normal numbers made on the device, a slice at a time where there are many."""

    def make(key, shape):
        return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)

    key = jax.random.key(seed)
    if np.prod(shape) < 2**28:
        return jax.jit(make, static_argnums=1)(key, shape)
    return jax.jit(lambda keys: jax.lax.map(lambda key: make(key, shape[1:]), keys))(jax.random.split(key, shape[0]))


def seconds(step, x, *rest):
    """Per call of x -> step(x, *rest), which has x's shape: the best of a few runs of one compiled loop."""

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def loop(x, *rest):
        return jax.lax.fori_loop(0, REPEATS, lambda _, x: (x + 1e-3 * step(x, *rest)).astype(x.dtype), x)

    jax.block_until_ready(loop(x, *rest))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(loop(x, *rest))
        best = min(best, (time.perf_counter() - start) / REPEATS)
    return best


def copy_rate():
    """Bytes read and written in a second."""
    x = jnp.zeros((1 << 30,), jnp.bfloat16)
    step = jax.jit(lambda x: x + 1)
    x = step(x)
    best = float("inf")
    for _ in range(3):
        jax.block_until_ready(x)
        start = time.perf_counter()
        for _ in range(10):
            x = step(x)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * x.nbytes / best


def error(result, truth):
    """Relative root mean square."""
    result, truth = (np.asarray(x, np.float64) for x in (result, truth))
    return float(np.sqrt(np.square(result - truth).mean() / np.square(truth).mean()))


def routes_right(tokens, experts=16, hidden=1024, k=2):
    x, gates = random(0, (tokens, hidden)), random(1, (2, experts, hidden), hidden**-0.5, "float32")
    got, want = (
        jax.jit(functools.partial(pallas_kernels.expert_routes, k=k, implementation=name))(x, gates, jnp.int32(1))
        for name in ("hopper", "xla")
    )
    return {"others": int(np.sum(np.asarray(got[0]) != want[0])), "error": error(got[1], want[1])}


def routes_time(tokens, experts=16, hidden=1024, layers=8, implementation="hopper"):
    gates = random(1, (layers, experts, hidden), hidden**-0.5, "float32")
    op = functools.partial(pallas_kernels.expert_routes, k=2, implementation=implementation)

    def step(x, gates):
        for layer in range(layers):
            routes, weights = op(x, gates, jnp.int32(layer))
            x = (x + (routes * weights).sum(1, keepdims=True)).astype(x.dtype)
        return x

    return {"us": seconds(step, random(0, (tokens, hidden)), gates) / layers * 1e6}


def projections(tokens, layers, heads, size, hidden):
    """x, and what a lightning layer makes of it: queries, keys, values and gate."""
    weights = (random(i, (layers, n * heads * size, hidden), hidden**-0.5) for i, n in ((1, 3), (2, 1)))
    return random(0, (tokens, hidden)), *weights


def project_step(size, implementation):
    def step(x, qkv, gate, layer):
        several = [Projection(qkv, "silu", 3, size), Projection(gate, "sigmoid")]
        return pallas_kernels.project(x, several, layer, implementation=implementation)

    return step


def project_right(tokens, heads=16, size=64, hidden=1024):
    arrays = projections(tokens, 2, heads, size, hidden)
    got, want = (jax.jit(project_step(size, name))(*arrays, jnp.int32(1)) for name in ("hopper", "xla"))
    return {"errors": [error(a, b) for a, b in zip(got, want, strict=True)]}


def project_time(rate, tokens, heads=16, size=64, hidden=1024, layers=8, implementation="hopper", output=False):
    """The four of a lightning layer, or the one behind attention."""
    x, qkv, gate = projections(tokens, layers, heads, size, hidden)

    def step(x, qkv, gate):
        for layer in range(layers):
            if output:
                (out,) = pallas_kernels.project(x, [Projection(gate)], jnp.int32(layer), implementation=implementation)
                x = x + out
            else:
                q, k, v, g = project_step(size, implementation)(x, qkv, gate, jnp.int32(layer))
                x = x + q * k + v * g
        return x

    took = seconds(step, x, qkv, gate) / layers
    moved = (1 if output else 4) * heads * size * hidden * 2
    return {"us": took * 1e6, "of_copy": moved / took / rate}


def expert_arrays(tokens, layers, experts, hidden, inner, k=2):
    x = random(tokens, (tokens, hidden))
    w1, w3 = (random(i, (layers, experts, inner, hidden), hidden**-0.5) for i in (1, 2))
    w2 = random(3, (layers, experts, hidden, inner), inner**-0.5)
    rng = np.random.default_rng(tokens)
    routes = jnp.asarray(np.argsort(rng.random((tokens, experts)), axis=1)[:, :k], jnp.int32)
    return x, w1, w3, w2, routes, jnp.asarray(rng.random((tokens, k)), jnp.float32)


def experts_right(tokens, layers=2, experts=8, hidden=1024, inner=1536):
    arrays = expert_arrays(tokens, layers, experts, hidden, inner)
    arrays = (*arrays[:4], arrays[4].at[0, 0].set(-1), arrays[5])
    got = jax.jit(functools.partial(pallas_kernels.expert_mlp, implementation="hopper"))(*arrays, layer=jnp.int32(1))
    x, w1, w3, w2 = (a.astype(jnp.float32) for a in arrays[:4])
    one_layer = (w[1] for w in (w1, w3, w2))
    want = jax.jit(functools.partial(pallas_kernels.expert_mlp, implementation="reference"))(x, *one_layer, *arrays[4:])
    return {"error": error(got, want)}


def experts_time(rate, tokens, *, experts, hidden, inner, layers=1, few=True):
    """With `few=False` by the products of 128 rows an expert."""
    arrays = expert_arrays(tokens, layers, experts, hidden, inner)
    was = hopper_few.TOKENS
    hopper_few.TOKENS = was if few else 0
    try:
        one_layer = jax.jit(functools.partial(pallas_kernels.expert_mlp, implementation="hopper"))  # lowered once

        def step(x, *arrays):
            for layer in range(layers):
                x = one_layer(x, *arrays, layer=jnp.int32(layer))
            return x

        took = seconds(step, *arrays) / layers
    finally:
        hopper_few.TOKENS = was
    used = len(np.unique(np.asarray(arrays[4])))
    moved = used * 3 * hidden * inner * 2
    return {"us": took * 1e6, "GB": moved / 1e9, "of_copy": moved / took / rate}


def pages_of(rng, batch, n, count):
    return jnp.asarray(rng.permutation(count)[: batch * n].reshape(batch, n), jnp.int32)


def attention_right(batch, heads, kv_heads, size, page_size, n, lengths):
    rng = np.random.default_rng(batch)
    count = batch * n + 3
    q = random(0, (batch, heads, size))
    keys, values = (random(i, (count, page_size, kv_heads, size)) for i in (1, 2))
    arrays = (pages_of(rng, batch, n, count), jnp.asarray(lengths, jnp.int32))
    op = pallas_kernels.softmax_attention_decode
    got = jax.jit(functools.partial(op, implementation="hopper"))(q, keys, values, *arrays)
    q, keys, values = (x.astype(jnp.float32) for x in (q, keys, values))
    want = jax.jit(functools.partial(op, implementation="reference"))(q, keys, values, *arrays)
    idle = np.asarray(lengths) == 0
    assert not np.asarray(got, np.float32)[idle].any(), "idle rows are not zero"
    return {"error": error(got, want)}


def attention_time(rate, batch, length, heads, kv_heads, page_size, size=128, ragged=False, old=False):
    n = -(-length // page_size)
    rng = np.random.default_rng(0)
    q = random(0, (batch, heads, size))
    keys, values = (random(i, (batch * n, page_size, kv_heads, size)) for i in (1, 2))
    lengths = rng.integers(1, length + 1, batch) if ragged else np.full(batch, length)
    pages = pages_of(rng, batch, n, batch * n)
    lengths = jnp.asarray(lengths, jnp.int32)

    def paged(q, keys, values, pages, lengths):
        return pallas_kernels.softmax_attention_decode(q, keys, values, pages, lengths, implementation="hopper")

    def contiguous(q, keys, values, pages, lengths):
        k, v = (x.reshape(batch, n * page_size, kv_heads, size) for x in (keys, values))
        return pallas_kernels.softmax_attention(q[:, None], k, v, q_start=lengths - 1)[:, 0]

    took = seconds(contiguous if old else paged, q, keys, values, pages, lengths)
    moved = int(lengths.sum()) * kv_heads * size * 2 * 2
    return {"us": took * 1e6, "GB": moved / 1e9, "of_copy": moved / took / rate}


def states_in_place(rate, sequences=64, heads=16, layers=8, size=128):
    """A scan over layers whose states are one pool: per layer, and what the program wants beside its arguments."""
    pool = random(0, (layers * sequences, heads, size, size), dtype="float32")
    q = random(1, (sequences, heads, size))
    log_decay = jnp.full(heads, -0.01)
    slots = jnp.arange(sequences, dtype=jnp.int32)

    def step(q, pool):
        def layer(carry, index):
            q, pool = carry
            o, pool = pallas_kernels.lightning_attention_decode(q, q, q, log_decay, pool, slots + index * sequences)
            return (o, pool), None

        return jax.lax.scan(layer, (q, pool), jnp.arange(layers, dtype=jnp.int32))[0]

    compiled = jax.jit(step, donate_argnums=1).lower(q, pool).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    nbytes = pool.nbytes
    out, pool = compiled(q, pool)
    best = float("inf")
    for _ in range(3):
        jax.block_until_ready(pool)
        start = time.perf_counter()
        for _ in range(5):
            out, pool = compiled(q, pool)
        jax.block_until_ready((out, pool))
        best = min(best, (time.perf_counter() - start) / 5)
    return {"us": best / layers * 1e6, "of_copy": 2 * nbytes / best / rate, "temporaries": memory.temp_size_in_bytes}


def tokens(sequences, heads, size):
    q, k, v = (random(i, (sequences, heads, size), size**-0.5) for i in range(3))
    return q, k, v, jnp.asarray(-np.geomspace(0.5, 1e-4, heads), jnp.float32)


def ring_right(sequences=9, heads=4, size=128, room=16, steps=40):
    """Forty steps of sequences that fold at different times, one of them idle, beside the states written every step."""
    q, k, v, log_decay = tokens(steps * sequences, heads, size)
    q, k, v = (x.reshape(steps, sequences, heads, size) for x in (q, k, v))
    pool = random(3, (sequences + 1, heads, size, size), dtype="float32")
    slots = jnp.arange(sequences, dtype=jnp.int32)[::-1].at[2].set(-1)
    pools = [jnp.zeros((sequences + 1, heads, room, size), jnp.bfloat16)] * 2

    @jax.jit
    def both(pool, keys, values):
        def step(carry, token):
            q, k, v = token
            plain, pool, keys, values, counts = carry
            want, plain = pallas_kernels.lightning_attention_decode(q, k, v, log_decay, plain, slots)
            got, pool, keys, values = pallas_kernels.lightning_attention_decode_ring(
                q, k, v, log_decay, pool, keys, values, counts, slots, implementation="hopper"
            )
            return (plain, pool, keys, values, (counts + 1) % room), (got, want)

        # The first tokens of a sequence, before its state: zeros, which only let it decay.
        counts = jnp.arange(sequences, dtype=jnp.int32) % room
        aged = jnp.exp(log_decay[None] * counts[:, None])[..., None, None]
        plain = pool.at[jnp.where(slots < 0, sequences + 1, slots)].multiply(aged, mode="drop")
        (plain, pool, *_, counts), outputs = jax.lax.scan(step, (plain, pool, keys, values, counts), (q, k, v))
        return outputs, plain, pool, counts

    (got, want), plain, pool, counts = both(pool, *pools)
    assert not np.asarray(got, np.float32)[:, 2].any(), "the idle sequence's output is not zero"
    full = [int(slots[n]) for n in range(sequences) if counts[n] == 0 and slots[n] >= 0]
    return {"error": error(got, want), "state": error(pool[np.array(full)], plain[np.array(full)])}


def ring_time(rate, sequences, heads, size=128, room=32, ring=True, together=False):
    """A step, the mean of `room` of them. All sequences fold in the same step, or as many in each."""
    q, k, v, log_decay = tokens(sequences, heads, size)
    pool = jnp.zeros((sequences, heads, size, size), jnp.float32)
    pools = [jnp.zeros((sequences, heads, room, size), jnp.bfloat16)] * 2
    slots = jnp.arange(sequences, dtype=jnp.int32)
    counts = jnp.zeros_like(slots) if together else slots % room

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def steps(pool, keys, values, q, k, v):
        def step(_, carry):
            q, pool, keys, values, counts = carry
            if ring:
                o, pool, keys, values = pallas_kernels.lightning_attention_decode_ring(
                    q, k, v, log_decay, pool, keys, values, counts, slots, implementation="hopper"
                )
            else:
                o, pool = pallas_kernels.lightning_attention_decode(q, k, v, log_decay, pool, slots)
            return (q + 1e-3 * o).astype(q.dtype), pool, keys, values, (counts + 1) % room

        return jax.lax.fori_loop(0, room, step, (q, pool, keys, values, counts))[:4]

    pools = [jnp.array(x) for x in pools]
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        out, pool, *pools = jax.block_until_ready(steps(pool, *pools, q, k, v))
        best = min(best, (time.perf_counter() - start) / room)
    moved = sequences * heads * size * size * 4 * 2
    return {"us": best * 1e6, "of_copy_if_written": moved / best / rate}


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, default=90)
    arguments.add_argument("--only", default="experts,routes,project,attention,states,ring")
    given = arguments.parse_args()
    device = jax.devices()[0]
    rate = copy_rate()
    results = {"device": device.device_kind, "jax": jax.__version__, "copy_TB_s": rate / 1e12}
    print(f"{device.device_kind}, JAX {jax.__version__}: copies {rate / 1e12:.2f} TB/s", flush=True)
    wide = functools.partial(experts_time, rate, experts=16, hidden=2048, inner=2048, layers=4)
    small = functools.partial(experts_time, rate, experts=16, hidden=1024, inner=1024, layers=8)
    m1 = functools.partial(experts_time, rate, experts=16, hidden=6144, inner=9216)
    attention = functools.partial(attention_time, rate, heads=64, kv_heads=8)
    wide_shape = {"size": 128, "hidden": 2048}
    cases = {
        "routes right, 5 tokens": lambda: routes_right(5),
        "routes right, 256 tokens of 2048": lambda: routes_right(256, hidden=2048),
        **{f"project right, {n} tokens": functools.partial(project_right, n) for n in (1, 19, 64)},
        "project right, 64 tokens of 2048": lambda: project_right(64, size=128, hidden=2048),
        **{
            f"{op} {name}, {n} tokens, {how}": functools.partial(function, n, implementation=how, **shape)
            for n in (64, 1)
            for name, shape in (("m1-1b", {}), ("wide", wide_shape))
            for op, function in (
                ("routes", lambda n, size=64, **options: routes_time(n, **options)),
                ("project", functools.partial(project_time, rate)),
                ("project out", functools.partial(project_time, rate, output=True)),
            )
            for how in ("hopper", "xla")
        },
        "experts wide, 64 tokens": lambda: wide(64),
        "experts m1-1b, 64 tokens": lambda: small(64),
        "attention 1 x 1M": lambda: attention(1, 1 << 20, page_size=1 << 20),
        "attention 64 x 8k": lambda: attention(64, 8192, page_size=256),
        "ring right": ring_right,
        "ring 64 x 64 heads": lambda: ring_time(rate, 64, 64),
        "ring 64 x 64 heads, without": lambda: ring_time(rate, 64, 64, ring=False),
        "ring 256 x 64 heads": lambda: ring_time(rate, 256, 64),
        "ring 256 x 64 heads, without": lambda: ring_time(rate, 256, 64, ring=False),
        "experts right, 5 tokens": lambda: experts_right(5),
        "attention right, pages of 64": lambda: attention_right(5, 8, 2, 128, 64, 9, [1, 0, 576, 65, 300]),
        "experts wide, 256 tokens": lambda: wide(256),
        "experts wide, 512 tokens": lambda: wide(512),
        "experts wide, 1 token": lambda: wide(1),
        "attention 256 x 512": lambda: attention_time(rate, 256, 512, heads=16, kv_heads=4, page_size=64),
        "states 64 x 16 heads": lambda: states_in_place(rate),
        "attention 64 x up to 8k": lambda: attention(64, 8192, page_size=64, ragged=True),
        "experts wide, 128 tokens": lambda: wide(128),
        "experts m1-1b, 1 token": lambda: small(1),
        "experts m1-1b, 64 tokens, old": lambda: small(64, few=False),
        "attention m1-1b, 64 x 2k": lambda: attention_time(rate, 64, 2048, heads=16, kv_heads=4, page_size=64, size=64),
        "ring 64 x 64 heads, all fold together": lambda: ring_time(rate, 64, 64, together=True),
        "ring 64 x 16 heads of 64": lambda: ring_time(rate, 64, 16, size=64),
        "ring 64 x 16 heads of 64, without": lambda: ring_time(rate, 64, 16, size=64, ring=False),
        "experts M1, 64 tokens": lambda: m1(64),
        "attention 64 x 8k, old": lambda: attention(64, 8192, page_size=256, old=True),
        "experts M1, 1 token": lambda: m1(1),
        "experts wide, 64 tokens, old": lambda: wide(64, few=False),
        "experts wide, 128 tokens, old": lambda: wide(128, few=False),
        "experts M1, 64 tokens, old": lambda: m1(64, few=False),
        "attention right, one page": lambda: attention_right(3, 64, 8, 128, 4096, 1, [4096, 17, 4095]),
        "attention right, size 64": lambda: attention_right(40, 6, 6, 64, 128, 4, [(37 * i) % 513 for i in range(40)]),
        "experts right, 70 tokens": lambda: experts_right(70),
        "experts right, 200 tokens": lambda: experts_right(200),
        "attention 1 x 1M, old": lambda: attention(1, 1 << 20, page_size=1 << 20, old=True),
    }
    for name, case in cases.items():
        if not any(name.startswith(kind) for kind in given.only.split(",")):
            continue
        if time.perf_counter() - BEGUN > given.seconds:
            results[name] = "no time left"
            continue
        start = time.perf_counter()
        try:
            results[name] = case()
        except Exception as problem:  # the other cases still run
            traceback.print_exc()
            results[name] = f"{type(problem).__name__}: {problem}"[:600]
        print(f"{name:32} {results[name]}   ({time.perf_counter() - start:.1f} s)", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
