"""Experts spread over devices: `jax.lax.ragged_all_to_all`, which XLA:CPU does not know, is made of an all-gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import _hopper, exchanges_tokens, expert_mlp
from pallas_kernels.experts import exchange, hopper, hopper_matmul, routing
from tests.pallas_kernels.experts.test_api import assert_close, problem, run
from tests.pallas_kernels.experts.test_hopper import low

DEVICES, EXPERTS, BLOCK = 4, 3, 8
"""EXPERTS of each device"""


def ragged_all_to_all(operand, output, first, size, there, received, *, axis_name):
    """What everybody sends is written to where it says, if it is meant for me."""
    devices, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    everything = jax.lax.all_gather((operand, first, size, there), axis_name)
    for source in range(devices):
        rows, *parts = (a[source] for a in everything)
        first, sent, there = (a.reshape(devices, -1)[me] for a in parts)
        inside = (jnp.arange(len(rows)) >= first[:, None]) & (jnp.arange(len(rows)) < (first + sent)[:, None])
        place = jnp.sum(jnp.where(inside, there[:, None] + jnp.arange(len(rows)) - first[:, None], 0), axis=0)
        output = output.at[jnp.where(inside.any(0), place, len(output))].set(rows, mode="drop")
    return output


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)


def over_devices(function, *arrays, devices=DEVICES):
    """``function`` of each device's part of the arrays; its results lie one after the other."""
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    specs = PartitionSpec("expert")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs))(*arrays)


ROUTES = {
    "anywhere": lambda rng, shape: rng.integers(-1, DEVICES * EXPERTS + 1, shape),
    "all to one": lambda rng, shape: np.full(shape, 7),
    "none": lambda rng, shape: np.full(shape, -1),
    "first device only": lambda rng, shape: np.full(shape, 4) * (np.arange(shape[0]) < 10)[:, None] - 1,
}


@pytest.mark.parametrize("parts", [1, 1024])
@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_is_the_plan_of_all_tokens(monkeypatch, routes, parts):
    """Each device has the rows that it would have, were all devices' tokens its own; what goes back is the same too."""
    monkeypatch.setattr(exchange, "PARTS", parts)
    rng = np.random.default_rng(0)
    tokens, k = DEVICES * 10, 2
    routes = jnp.asarray(routes(rng, (tokens, k)), jnp.int32)
    x, values = (jnp.asarray(rng.normal(size=(tokens, n)), jnp.float32) for n in (5, k))

    def local(routes, x, values):
        e = exchange.exchange(routes, EXPERTS, BLOCK, "expert")
        rows = e.rows(x)
        assert len(rows) == e.length
        return rows, e.spread(values), e.gather(rows), e.start, e.size

    rows, spread, back, starts, sizes = over_devices(local, routes, x, values)
    places = rows.reshape(DEVICES, -1, 5), spread.reshape(DEVICES, -1)
    total = 0.0
    for device in range(DEVICES):
        want = routing.plan(routes - device * EXPERTS, EXPERTS, BLOCK)
        mine = slice(device * EXPERTS, (device + 1) * EXPERTS)
        np.testing.assert_array_equal(starts[mine], want.start)
        np.testing.assert_array_equal(sizes[mine], want.size)
        used = int(want.size.sum())
        np.testing.assert_array_equal(places[0][device, :used], want.rows(x)[:used])
        np.testing.assert_array_equal(places[1][device], want.spread(values)[: places[1].shape[1]])
        total += want.gather(want.rows(x))
    np.testing.assert_array_equal(back, total)


def rows_product(lhs, rhs, experts, used, *, transpose_rhs, combine=None, outputs=1, interpret):
    """What the kernel computes: the interpreter does not know several devices. Nothing is written behind the rows."""

    def product(rows, matrices):
        tiles = rows.reshape(len(experts), -1, rows.shape[1])
        equation = "tri,toi->tro" if transpose_rhs else "tri,tio->tro"
        return jnp.einsum(equation, tiles, matrices[experts], preferred_element_type=jnp.float32)

    if combine is None:
        found = [sum(map(product, lhs, rhs))]
    else:
        found = combine(*(product(lhs[0], matrices) for matrices in rhs))
    written = (jnp.arange(len(experts)) < used)[:, None, None]
    return [jnp.where(written, a, jnp.nan).astype(jnp.bfloat16).reshape(-1, a.shape[-1]) for a in found]


def weights_product(lhs, rhs, *, first, count, interpret):
    rows = jnp.arange(len(lhs))[:, None]
    inside = (rows >= first) & (rows < first + count)
    a, b = (jnp.where(inside[:, None, :], x[:, :, None], 0) for x in (lhs, rhs))
    return jnp.einsum("rme,rne->emn", a, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16)


def gate_gradient(d_hidden, up, gate, share, used, *, interpret):
    arrays = (a.astype(jnp.float32) for a in (up, gate, share[:, None]))
    hidden, pull = jax.vjp(lambda up, gate, share: share * jax.nn.silu(up) * gate, *arrays)
    d_up, d_gate, d_share = pull(d_hidden.astype(jnp.float32))
    inside = jnp.arange(len(up))[:, None] < used
    found = [jnp.where(inside, a, jnp.nan).astype(jnp.bfloat16) for a in (d_up, d_gate, hidden)]
    return *found, d_share[:, 0]


@pytest.mark.parametrize("routes", ["anywhere", "all to one", "none"])
def test_equals_oracle(monkeypatch, routes):
    """Everything but the kernels themselves: the output and all gradients."""
    devices, experts = 2, 2
    monkeypatch.setattr(_hopper, "missing", lambda: None)
    monkeypatch.setattr(hopper_matmul, "rows_product", rows_product)
    monkeypatch.setattr(hopper_matmul, "weights_product", weights_product)
    monkeypatch.setattr(hopper, "gate_gradient", gate_gradient)
    chosen = {"anywhere": None, "all to one": np.full((20, 2), [3, 0]), "none": np.full((20, 2), -1)}[routes]
    arrays, routes = problem(20, devices * experts, 2, 128, 128, chosen)
    mlp = functools.partial(expert_mlp, implementation="hopper", axis_name="expert")

    def all_of_it(*arrays):
        y, pull = jax.vjp(
            lambda x, w1, w3, w2, weights: over_devices(mlp, x, w1, w3, w2, routes, weights, devices=devices), *arrays
        )
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

    got = [a.astype(jnp.float32) for a in all_of_it(*low(arrays))]
    want = run(tuple(a.astype(jnp.float32) for a in low(arrays)), routes, "reference")
    assert_close(got, want, tolerance=5e-3)


def test_only_where_it_runs():
    arrays, routes = problem(20, 4, 2, 128, 128)
    assert not exchanges_tokens(*arrays[:4], devices=2)  # a CPU
    x, w1, w3, w2, weights = arrays
    with pytest.raises(ValueError, match="'ragged' exchanges no tokens, so axis_name must be None"):
        expert_mlp(x, w1, w3, w2, routes, weights, axis_name="expert", implementation="ragged")
