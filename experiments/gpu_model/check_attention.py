"""Packed softmax attention on a GPU: errors against the float32 oracle, times beside cuDNN's unpacked and other forms.

    python -m experiments.gpu_model.check_attention

Shapes of the preset `wide`: 16 query and 4 key/value heads of 128. The last line is everything as JSON.
"""

import functools
import json
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo

from experiments.gpu_model.check_head import milliseconds, report, rows
from pallas_kernels import PADDING, softmax_attention
from pallas_kernels.softmax.api import LADDER

HEADS, KV_HEADS, SIZE = 16, 4, 128
Attention = Callable[..., jax.Array]


def packed(seed: int, batch: int, length: int, mean: int, padding: int = 0) -> np.ndarray:
    """[batch, length] int32: rows of segments of random lengths around `mean`, padding at the end."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(batch):
        parts = random.integers(mean // 2, mean + mean // 2 + 1, 2 * length // mean + 2)
        row = np.repeat(np.arange(len(parts)), parts)[:length]
        row[length - padding :] = PADDING
        rows.append(row)
    return np.array(rows, np.int32)


def pairs(ids: np.ndarray) -> int:
    """How many pairs of a query and a key that it sees."""
    total = 0
    for row in ids:
        _, counts = np.unique(row[row != PADDING], return_counts=True)
        total += int((counts * (counts + 1) // 2).sum())
    return total


def cudnn_packed(segments: int) -> Attention:
    """cuDNN's own packed form, for rows of no more than so many segments."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        batch, length = segment_ids.shape
        real = segment_ids != PADDING
        begins = real & (jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0)
        number = jnp.cumsum(begins, axis=1) - 1
        row = jnp.arange(batch)[:, None]
        offsets = jnp.full((batch, segments + 1), -1, jnp.int32)
        at = jnp.where(begins, number, segments + 1)
        offsets = offsets.at[row, at].set(jnp.arange(length, dtype=jnp.int32), mode="drop")
        counts = jnp.zeros((batch, segments), jnp.int32).at[row, number].add(real.astype(jnp.int32), mode="drop")
        counts = jnp.where(counts > 0, counts, -1)
        o = fused_attention_stablehlo.dot_product_attention(
            q, k, v, q_seqlen=counts, kv_seqlen=counts, q_offsets=offsets, kv_offsets=offsets, scale=SIZE**-0.5,
            mask_type=fused_attention_stablehlo.MaskType.PADDING_CAUSAL,
        )  # fmt: skip
        return jnp.where(real[..., None, None], cast(jax.Array, o), 0)

    return attend


def arrays(batch: int, length: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, length, n, SIZE) for n in (heads, kv_heads, kv_heads, heads)]
    return [
        jax.jit(lambda key, shape=shape: jax.random.normal(key, shape).astype(jnp.bfloat16))(key)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def with_gradients(function: Attention) -> Callable[..., tuple[jax.Array, ...]]:
    @jax.jit
    def both(do: jax.Array, *qkv: jax.Array) -> tuple[jax.Array, ...]:
        o, transposed = jax.vjp(function, *qkv)
        return o, *transposed(do)

    return both


def forms(ids: np.ndarray | None) -> dict[str, Attention]:
    """What is compared: name -> function of q, k and v."""
    ids_here = None if ids is None else jnp.asarray(ids)
    named = functools.partial(softmax_attention, segment_ids=ids_here)
    found = {}
    if "hopper" in LADDER.implementations:
        found["hopper"] = functools.partial(named, implementation="hopper")
    if ids is None:
        found["cudnn"] = functools.partial(named, implementation="cudnn")
    else:
        most = int(max(len(np.unique(row)) for row in ids))
        found[f"cudnn packed, up to {most}"] = functools.partial(cudnn_packed(most), segment_ids=ids_here)
    found["blocked"] = functools.partial(named, implementation="blocked")
    return found


def errors(name: str, ids: np.ndarray | None, heads: int, kv_heads: int, length: int) -> None:
    q, k, v, do = arrays(1 if ids is None else len(ids), length, heads, kv_heads)
    ids_here = None if ids is None else jnp.asarray(ids)
    oracle = functools.partial(softmax_attention, segment_ids=ids_here, implementation="reference")
    exact = [x.astype(jnp.float32) for x in (do, q, k, v)]
    truths = with_gradients(oracle)(*exact)

    def measure(form: Attention) -> dict[str, float]:
        found = {}
        for part, result, truth in zip(("o", "dq", "dk", "dv"), with_gradients(form)(do, q, k, v), truths, strict=True):
            error, truth = np.asarray(result.astype(jnp.float32)) - np.asarray(truth), np.asarray(truth)
            found[part] = float(np.sqrt(np.square(error).mean() / np.square(truth).mean()))
        return found

    for form, function in forms(ids).items():
        if form != "blocked":
            report(f"error, {name}: {form}", functools.partial(measure, function))


def times(name: str, ids: np.ndarray | None, batch: int, length: int, skip: tuple[str, ...] = ()) -> None:
    q, k, v, do = arrays(batch, length)
    count = batch * length * (length + 1) // 2 if ids is None else pairs(ids)
    flop = 4 * HEADS * SIZE * count

    def measure(function: Attention) -> dict[str, float]:
        forward = milliseconds(jax.jit(function), q, k, v)
        both = milliseconds(with_gradients(function), do, q, k, v)
        rates = {"forward_tflop_per_s": flop / forward * 1e-9, "both_tflop_per_s": 3.5 * flop / both * 1e-9}
        return {"forward_ms": forward, "both_ms": both, **rates}

    for form, function in forms(ids).items():
        if form not in skip:
            report(f"time, {name}: {form}", functools.partial(measure, function))


def cache(length: int, keys: int) -> None:
    """Queries that continue a cache; flop of cuDNN's unpacked form are counted likewise."""
    q, _, _, do = arrays(1, length)
    _, k, v, _ = arrays(1, keys)
    start = jnp.array([keys - length], jnp.int32)
    flop = 4 * HEADS * SIZE * (length * (keys - length) + length * (length + 1) // 2)

    def measure(name: str) -> dict[str, float]:
        attend = functools.partial(softmax_attention, q_start=start, implementation=name)
        ms = milliseconds(jax.jit(attend), q, k, v)
        return {"forward_ms": ms, "forward_tflop_per_s": flop / ms * 1e-9}

    def wrong() -> dict[str, float]:
        found = {}
        for name, form in (("hopper", "hopper"), ("blocked", "blocked")):
            attend = functools.partial(softmax_attention, q_start=start, implementation=form)
            found[name] = with_gradients(attend)(do, q, k, v)
        names = ("o", "dq", "dk", "dv")
        pairs = zip(names, found["hopper"], found["blocked"], strict=True)
        return {n: float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b)) for n, a, b in pairs}

    report(f"difference from blocked, {length} queries on {keys} keys", wrong)
    for name in ("hopper", "blocked"):
        report(f"time, {length} queries on {keys} keys: {name}", functools.partial(measure, name))


def main() -> None:
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    errors("one segment", None, 4, 1, 1000)
    errors("packed", packed(0, 2, 1000, 150, padding=70), 4, 2, 1000)
    errors("short", packed(1, 2, 512, 12, padding=3), 4, 4, 512)
    times("8 x 4096, one segment", None, 8, 4096, skip=("blocked",))
    times("8 x 4096, segments of 1024", packed(2, 8, 4096, 1024), 8, 4096)
    times("8 x 4096, segments of 128", packed(3, 8, 4096, 128), 8, 4096, skip=("blocked",))
    times("1 x 32768, one segment", None, 1, 32768, skip=("blocked",))
    times("1 x 32768, segments of 4096", packed(4, 1, 32768, 4096), 1, 32768, skip=("blocked",))
    cache(1000, 8192)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
