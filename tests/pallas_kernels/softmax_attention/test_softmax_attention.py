"""Blocked attention, outputs and gradients, against the oracle that writes all scores out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PADDING, softmax_attention
from pallas_kernels.softmax_attention import blocked


def run(arrays, implementation, **where):
    def all_of_it(*arrays):
        o, pull = jax.vjp(lambda q, k, v: softmax_attention(q, k, v, implementation=implementation, **where), *arrays)
        return o, *pull(jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape))

    return jax.jit(all_of_it)(*arrays)


@pytest.mark.parametrize(
    ("T", "heads", "kv_heads", "mode"),
    [
        (63, 4, 4, "plain"),
        (257, 8, 1, "plain"),
        (257, 4, 2, "segments"),
        (1, 4, 2, "cache"),
        (100, 2, 2, "cache"),
    ],
)
def test_equals_oracle(monkeypatch, T, heads, kv_heads, mode):
    monkeypatch.setattr(blocked, "Q_ROWS", 64)  # several blocks at small lengths
    monkeypatch.setattr(blocked, "K_BLOCK", 32)
    rng = np.random.default_rng(0)
    S = 300 if mode == "cache" else T
    shapes = ((2, T, heads, 16), (2, S, kv_heads, 16), (2, S, kv_heads, 16))
    arrays = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    where = {}
    if mode == "cache":
        where["q_start"] = jnp.asarray([17, S - T], jnp.int32)
    if mode == "segments":
        ids = np.sort(rng.integers(0, 5, (2, T)), axis=1)
        ids[0, -40:] = PADDING
        where["segment_ids"] = jnp.asarray(ids, jnp.int32)
    got, want = run(arrays, "blocked", **where), run(arrays, "reference", **where)
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        error = np.sqrt(np.mean((a - b) ** 2)) / np.sqrt(np.mean(np.square(b)))
        assert error <= 1e-5, f"{name}: relative RMS {error:.1e}"
    if mode == "segments":
        assert not np.asarray(got[0][0, -40:]).any()


def test_unknown_implementation():
    x = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="unknown implementation"):
        softmax_attention(x, x, x, implementation="fast")
