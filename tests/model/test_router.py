"""The router's products on matrix units, computed here by plain bfloat16 products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax.model import moe
from tests.model.conftest import random_tokens, small_model


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 256)), jnp.bfloat16)
    return x, jnp.asarray(rng.normal(size=(8, 256)) / 16, jnp.float32)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(moe, "target_platform", lambda: "gpu")


@pytest.mark.usefixtures("on_gpu")
def test_as_accurate_as_float32(arrays):
    x, gate = arrays
    exact = np.asarray(x, np.float64) @ np.asarray(gate, np.float64).T
    np.testing.assert_allclose(jax.jit(moe.router_logits)(x, gate), exact, atol=2e-6)


@pytest.mark.usefixtures("on_gpu")
def test_gradients(arrays):
    x, gate = arrays
    given = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 8)), jnp.float32)

    def gradients(f, x):
        return jax.grad(lambda x, gate: jnp.sum(f(x, gate) * given), argnums=(0, 1))(x, gate)

    got = gradients(moe.router_logits, x)
    want = gradients(lambda x, gate: x @ gate.T, x.astype(jnp.float32))
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    for a, b in zip(got, want):
        a = np.asarray(a, np.float32)
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b)  # three roundings to bfloat16


def test_float32_stays_float32(arrays, monkeypatch):
    x, gate = arrays
    x = x.astype(jnp.float32)
    before = moe.router_logits(x, gate)
    monkeypatch.setattr(moe, "target_platform", lambda: "gpu")
    np.testing.assert_array_equal(moe.router_logits(x, gate), before)


def test_a_single_expert_gives_the_router_no_gradient():
    """Its weight is one, whatever the router says; rounding would be a direction for Adam."""
    model = small_model("L", experts_per_token=1)
    graph, params = nnx.split(model)
    tokens = random_tokens(0, 2, 16)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params).forward(tokens).hidden ** 2)

    gradients = jax.jit(jax.grad(loss))(params)
    assert not np.any(gradients["runs"][0]["moe"]["gate"][...])
    assert np.any(gradients["runs"][0]["moe"]["w1"][...])


def test_sums_over_segments_and_their_gradient():
    """Segments shorter and longer than a part, ids that come back later in a row, padding in the middle."""
    rng = np.random.default_rng(0)
    lengths = [(1, 1, 3), (2, 2, 200), (3, 0, 5), (1, 1, 64), (5, 7, 28)]
    ids = np.stack([np.concatenate([np.full(n, pair[i]) for *pair, n in lengths]) for i in range(2)])
    runs = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
    ids, values = jnp.asarray(ids), jnp.asarray(rng.normal(size=(*ids.shape, 3)), jnp.float32)
    same = (runs[:, :, None] == runs[:, None]).astype(np.float64)
    np.testing.assert_allclose(moe._over_segments(values, ids), same @ values, rtol=1e-5, atol=1e-5)
    given = jnp.asarray(rng.normal(size=values.shape), jnp.float32)
    _, pullback = jax.vjp(lambda x: moe._over_segments(x, ids), values)
    np.testing.assert_allclose(pullback(given)[0], same @ given, rtol=1e-5, atol=1e-5)
