"""The loop over layers against the same layers one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.model import depth
from m1jax.model.depth import over_layers


@jax.custom_vjp
def three_times(x):
    return 3 * x


three_times.defvjp(lambda x: (3 * x, 3.0), lambda three, d: (three * d,))  # keeps a number


def layer(run, weights, h, constants, number):
    """Two kinds of layers that keep things, read constants, and tell one thing with a gradient and one without."""
    scale, shifts = constants
    inner = jnp.tanh(h @ weights["a"] * scale + shifts[run][number])
    h = three_times(h) / 3 + (inner if run == 0 else jnp.sin(inner) * weights["b"])
    return (h, jnp.sum(inner**2, axis=-1)), jnp.argmax(h, axis=-1) + number


def problem(periods, counts):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    sizes = [periods * count for count in counts]
    weights = [{"a": draw(n, 6, 6) / 3} | ({"b": draw(n, 6)} if run else {}) for run, n in enumerate(sizes)]
    return weights, draw(2, 6), (draw(6), [draw(n, 6) for n in sizes])


def one_by_one(periods, counts, weights, h, constants):
    found = [[] for _ in counts]
    for p in range(periods):
        for run, count in enumerate(counts):
            for number in range(p * count, (p + 1) * count):
                own = jax.tree.map(lambda x, number=number: x[number], weights[run])
                (h, aux), rest = layer(run, own, h, constants, number)
                found[run].append((aux, rest))
    return h, [jax.tree.map(lambda *x: jnp.stack(x), *each) for each in found]


def loss(result):
    h, found = result
    return jnp.sum(h**2) + sum(jnp.sum(aux * jnp.arange(1.0, 1 + aux.size).reshape(aux.shape)) for aux, _ in found)


def plain(periods, counts, *arrays):
    return over_layers(layer, periods, counts, *arrays)


def kept_nothing(periods, counts, *arrays):
    return over_layers(jax.checkpoint(layer, static_argnums=0), periods, counts, *arrays)


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """The programs for a GPU are another; with ``jnp.zeros`` for room they run anywhere."""
    monkeypatch.setattr(depth, "target_platform", lambda: request.param)
    monkeypatch.setattr(jax.lax, "empty", jnp.zeros, raising=False)
    monkeypatch.setattr(depth, "WRITTEN_OUT", 2)


@pytest.mark.parametrize("function", [plain, kept_nothing])
@pytest.mark.parametrize(
    ("periods", "counts"), [(1, (1,)), (1, (4,)), (3, (1,)), (2, (3, 1)), (3, (2, 2)), (3, (1, 2, 1)), (1, (1, 1))]
)
def test_equals_layers_one_by_one(platform, function, periods, counts):
    arrays = problem(periods, counts)
    got = jax.jit(function, static_argnums=(0, 1))(periods, counts, *arrays)
    want = one_by_one(periods, counts, *arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    weights, h, constants = arrays

    def gradient(f):
        return jax.jit(jax.grad(lambda w, h: loss(f(periods, counts, w, h, constants)), argnums=(0, 1)))

    got, want = gradient(function)(weights, h), gradient(one_by_one)(weights, h)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_under_vmap():
    weights, h, constants = problem(2, (2, 1))
    gradient = jax.grad(lambda h: loss(over_layers(layer, 2, (2, 1), weights, h, constants)))
    many, alone = jnp.stack([h, 2 * h, -h]), jax.jit(gradient)
    got = jax.jit(jax.vmap(gradient))(many)
    np.testing.assert_allclose(got, np.stack([alone(x) for x in many]), rtol=1e-4, atol=1e-5)


def test_keeps_neither_weights_nor_constants():
    """What is carried from forward to backward pass: a layer's input and what it computed, and nothing that is there
    anyhow."""
    weights, h, constants = problem(1, (5,))
    _, pullback = jax.vjp(lambda w, h: kept_nothing(1, (5,), w, h, constants)[0], weights, h)
    shapes = sorted(x.shape for x in jax.tree.leaves(pullback))
    assert shapes.count((5, 6, 6)) == 1, shapes  # the weights themselves
    assert shapes.count((5, 2, 6)) == 1, shapes  # inputs


def test_on_a_gpu_what_is_kept_is_read_where_it_lies(monkeypatch):
    """Else XLA would compute it twice, or copy what a kernel could write where it is to lie."""

    def layer(run, weights, h, constants, number):
        inner = jnp.tanh(h @ weights)  # read on the way on, and kept for the gradient
        return (jnp.sin(inner), jnp.zeros(h.shape[:1])), None

    weights, h = jnp.ones((3, 4, 4)), jnp.ones((2, 4))

    def program():
        return str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(over_layers(layer, 1, (3,), [w], h, ())[0])))(weights))

    assert "optimization_barrier" not in program()
    monkeypatch.setattr(depth, "target_platform", lambda: "gpu")
    piece = depth._Piece.of(layer, 0, weights, h, ())
    stacks = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in piece.kept]
    traced = jax.make_jaxpr(lambda *arguments: piece.forward(*arguments))(weights[0], h, (), 0, stacks)
    barriers = [e for e in traced.eqns if e.primitive.name == "optimization_barrier"]
    assert len(barriers) == len(piece.kept) - 1  # all but the layer's input, which was made before
    # What is behind a barrier is only read: the stacks that go on are those that were written into.
    assert {e.invars[0] for e in barriers} < set(traced.jaxpr.outvars)
