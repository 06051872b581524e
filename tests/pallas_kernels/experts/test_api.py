"""Outputs and all gradients of every implementation against the oracle that computes every expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import expert_mlp
from pallas_kernels.experts import grouped

FAST = ["grouped", "ragged"]


def problem(tokens=37, experts=5, k=2, hidden=32, inner=48, routes=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (tokens, hidden),
        "w1": (experts, inner, hidden),
        "w3": (experts, inner, hidden),
        "w2": (experts, hidden, inner),
    }
    arrays = [jnp.asarray(rng.normal(size=s) / s[-1] ** 0.5, jnp.float32) for s in shapes.values()]
    if routes is None:
        routes = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :k]
    weights = jnp.asarray(rng.uniform(size=np.shape(routes)), jnp.float32)
    return (*arrays, weights), jnp.asarray(routes, jnp.int32)


def run(arrays, routes, implementation):
    """The output and the gradients of x, w1, w3, w2 and weights."""

    def call(x, w1, w3, w2, weights):
        return expert_mlp(x, w1, w3, w2, routes, weights, implementation=implementation)

    def all_of_it(*arrays):
        y, pull = jax.vjp(call, *arrays)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

    return jax.jit(all_of_it)(*arrays)


def assert_close(got, want, tolerance=1e-5):
    for name, a, b in zip(("y", "dx", "dw1", "dw3", "dw2", "dweights"), got, want, strict=True):
        assert a.dtype == b.dtype, name
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30)
        assert np.isfinite(a).all(), name
        assert error <= tolerance, f"{name}: relative RMS {error:.1e}"


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(1, 5, 2), (1, 1, 1), (3, 5, 3), (9, 3, 2), (64, 8, 1), (257, 4, 2), (300, 2, 2), (40, 64, 2)],
)
def test_equals_oracle(implementation, tokens, experts, k):
    arrays, routes = problem(tokens, experts, k)
    assert_close(run(arrays, routes, implementation), run(arrays, routes, "reference"))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    "routes",
    [
        pytest.param(np.full((70, 2), 3), id="all to one, twice"),
        pytest.param(np.stack([np.full(70, 0), np.full(70, 4)], 1), id="empty experts between"),
        pytest.param(np.random.default_rng(1).integers(-3, 9, size=(70, 3)), id="ids out of range"),
        pytest.param(np.where(np.arange(70)[:, None] < 20, [[1, 2]], 5), id="padding at the end"),
        pytest.param(np.array([[-1, 5], [2**31 - 1, -(2**31)]]), id="nothing at all"),
    ],
)
def test_unusual_routes(implementation, routes):
    arrays, routes = problem(len(routes), 5, routes=routes)
    got, want = run(arrays, routes, implementation), run(arrays, routes, "reference")
    if not np.isin(routes, np.arange(5)).any():
        assert all(not np.asarray(a).any() for a in got)
        return
    assert_close(got, want)


@pytest.mark.parametrize("hidden", [32, 24])  # 24 is no multiple of the vectors that decoding uses
@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_few_tokens_of_one_expert(tokens, hidden):
    arrays, routes = problem(tokens, 3, hidden=hidden, routes=np.full((tokens, 1), 1))
    assert_close(run(arrays, routes, "grouped"), run(arrays, routes, "reference"))


def test_blocks_of_every_size():
    """Of each size one expert that fills it in part, and one that fills the largest and goes on in a smaller one."""
    assert grouped.BLOCKS == (8, 16, 32, 64, 128)  # all, in these tests
    routes = np.repeat(np.arange(6), [5, 12, 20, 40, 100, 150])[:, None]
    arrays, routes = problem(len(routes), 6, routes=routes)
    got, want = run(arrays, routes, "grouped"), run(arrays, routes, "reference")
    assert_close(got, want)
    op = jax.jit(functools.partial(expert_mlp, implementation="grouped"))  # without a gradient it is another program
    np.testing.assert_allclose(op(*arrays[:4], routes, arrays[4]), want[0], rtol=1e-5, atol=1e-6)


def test_rows_past_an_expert_do_not_leak():
    # 257 rows and 3: the first expert's last block runs over all of the second's rows.
    routes = np.where(np.arange(260)[:, None] < 257, 0, 1)
    arrays, routes = problem(260, 2, routes=routes)
    assert_close(run(arrays, routes, "grouped"), run(arrays, routes, "reference"))


def test_a_nan_in_an_unused_expert_stays_there():
    (x, w1, w3, w2, weights), routes = problem(6, 4, routes=np.full((6, 2), 2))
    poisoned = tuple(w.at[0].set(jnp.nan) for w in (w1, w3, w2))
    assert all(np.isfinite(np.asarray(a)).all() for a in run((x, *poisoned, weights), routes, "grouped"))


def test_cost_follows_the_experts_in_use():
    """What depends on E in the compiled program is slices, zeros, the routing, and products of at most eight rows an
    expert, which run where most experts have some."""
    arrays, routes = problem(64, 32, hidden=64, inner=64)
    text = jax.jit(lambda *a: grouped.forward(*a[:4], routes, a[4])).lower(*arrays).compile().as_text()
    assert not [line for line in text.splitlines() if " dot(" in line and "32,64,64" in line]


@pytest.mark.parametrize("implementation", FAST)
def test_bfloat16(implementation):
    arrays, routes = problem(50, 4)
    low = tuple(a.astype(jnp.bfloat16) for a in arrays)
    got = run(low, routes, implementation)
    assert all(a.dtype == jnp.bfloat16 for a in got)
    want = run(tuple(a.astype(jnp.float32) for a in low), routes, "reference")
    assert_close([a.astype(jnp.float32) for a in got], want, tolerance=1e-2)


def test_vmap():
    (x, w1, w3, w2, weights), routes = problem(24, 4)
    batched = [a.reshape(3, 8, -1) for a in (x, routes, weights)]
    got = jax.jit(jax.vmap(lambda x, r, w: expert_mlp(x, w1, w3, w2, r, w)))(*batched)
    want = expert_mlp(x, w1, w3, w2, routes, weights, implementation="reference")
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_experts(implementation, check_vma):
    """Every device holds two experts, sees all tokens and skips what is not its own; the outputs are summed."""
    arrays, routes = problem(40, 8)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = PartitionSpec("expert"), PartitionSpec()

    def local(x, w1, w3, w2, routes, weights):
        here = routes - 2 * jax.lax.axis_index("expert")
        return jax.lax.psum(expert_mlp(x, w1, w3, w2, here, weights, implementation=implementation), "expert")

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, split, split, split, whole, whole),
        out_specs=whole,
        check_vma=check_vma,
    )
    x = arrays[0]
    co = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    @jax.jit
    def all_of_it(*arrays):
        y, pull = jax.vjp(lambda x, w1, w3, w2, weights: sharded(x, w1, w3, w2, routes, weights), *arrays)
        return y, *pull(co)

    assert_close(all_of_it(*arrays), run(arrays, routes, "reference"))


@pytest.mark.parametrize("implementation", FAST)
def test_auto_mesh(implementation):
    arrays, routes = problem(40, 8)
    want = run(arrays, routes, "reference")
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        specs = [PartitionSpec("data"), *[PartitionSpec("expert")] * 3, PartitionSpec("data")]
        placed = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]
        assert_close(run(placed, routes, implementation), want)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", lambda a: a[0]),
        ("w1", lambda a: a[0]),
        ("w1", lambda a: a[..., :-1]),
        ("w3", lambda a: a[:, :-1]),
        ("w2", lambda a: a.mT),
        ("routes", lambda a: a[:-1]),
        ("routes", lambda a: a.astype(jnp.float32)),
        ("weights", lambda a: a[:, :1]),
        ("weights", lambda a: a.astype(jnp.int32)),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    (x, w1, w3, w2, weights), routes = problem(5, 3)
    arguments = {"x": x, "w1": w1, "w3": w3, "w2": w2, "routes": routes, "weights": weights}
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ValueError, match=f"expert_mlp: {name}"):
        expert_mlp(**arguments)


def stacked(arrays):
    """The weights as the last of three layers; the others are no numbers."""
    x, w1, w3, w2, weights = arrays
    w1, w3, w2 = (jnp.stack([jnp.full_like(w, jnp.nan)] * 2 + [w]) for w in (w1, w3, w2))
    return x, w1, w3, w2, weights


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_a_layer_of_a_stack(implementation):
    arrays, routes = problem(13, 5)
    x, w1, w3, w2, weights = stacked(arrays)
    op = functools.partial(expert_mlp, implementation=implementation)
    got = jax.jit(op)(x, w1, w3, w2, routes, weights, layer=jnp.int32(2))
    want = expert_mlp(*arrays[:4], routes, weights, implementation="reference")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_layer_of_a_stack_has_no_gradients():
    arrays, routes = problem(4, 3)
    x, w1, w3, w2, weights = stacked(arrays)
    with pytest.raises(ValueError, match=r"with `layer` there are no gradients; give the layer's own weights"):
        jax.grad(lambda x: expert_mlp(x, w1, w3, w2, routes, weights, layer=2).sum())(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (3, r"layer must be in 0\.\.2, got 3"),
        (np.int32(-1), r"layer must be in 0\.\.2, got -1"),
        (jnp.zeros(1, jnp.int32), "layer must be one integer"),
        (1.0, "layer must be one integer, got 1.0"),
        (None, r"w1 must be \[E, F, D\]"),
    ],
)
def test_refuses_layers(layer, message):
    arrays, routes = problem(4, 3)
    x, w1, w3, w2, weights = stacked(arrays)
    with pytest.raises(ValueError, match=message):
        expert_mlp(x, w1, w3, w2, routes, weights, layer=layer)


def beside(own, op, *arrays):
    """`op`, whose weights are also the last of three layers."""
    x, w1, w3, w2, weights = arrays
    return op(x, w1, w3, w2, own, weights, layer=jnp.int32(2), stacks=stacked(arrays)[1:4])


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_gradients_beside_the_stacks(implementation):
    arrays, routes = problem(13, 5)
    op = functools.partial(expert_mlp, implementation=implementation)
    got = jax.jit(jax.grad(lambda a: jnp.sum(beside(routes, op, *a) ** 2)))(arrays)
    want = jax.jit(jax.grad(lambda a: jnp.sum(op(*a[:4], routes, a[4]) ** 2)))(arrays)
    assert_close((want[0], *got), (want[0], *want), tolerance=1e-4)


@pytest.mark.parametrize(
    ("layer", "cut", "message"),
    [
        (None, slice(None), "with stacks, layer must say which"),
        (1, np.s_[:, 1:], r"the stack of w1 must be \[L, "),
        (3, slice(None), r"layer must be in 0\.\.2, got 3"),
    ],
)
def test_refuses_stacks(layer, cut, message):
    arrays, routes = problem(4, 3)
    x, w1, w3, w2, weights = arrays
    stacks = tuple(w[cut] for w in stacked(arrays)[1:4])
    with pytest.raises(ValueError, match=message):
        expert_mlp(x, w1, w3, w2, routes, weights, layer=layer, stacks=stacks)


def test_unknown_implementation():
    arrays, routes = problem(5, 3)
    with pytest.raises(ValueError, match=r"'auto' or one of \('reference', 'ragged', 'grouped', 'hopper'\)"):
        run(arrays, routes, "fast")
