"""The Hopper kernels in Pallas' interpreter, with race detection; test_hopper_compiled.py really compiles them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _hopper, expert_mlp
from pallas_kernels.experts import hopper, hopper_few, hopper_gate, hopper_matmul, reference
from tests.pallas_kernels.experts.test_api import assert_close, beside, problem, run, stacked

needs_newer_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10.2 interprets no transposed operands"
)


@pytest.fixture
def on_hopper(monkeypatch):
    """The public op believes that it is on an H200, and runs in the interpreter."""
    monkeypatch.setattr(_hopper, "missing", lambda: None)
    for name in ("forward", "forward_of_layer"):
        monkeypatch.setattr(hopper, name, functools.partial(getattr(hopper, name), interpret=True))


def low(arrays):
    return tuple(a.astype(jnp.bfloat16) for a in arrays)


def exact(arrays):
    return tuple(a.astype(jnp.float32) for a in arrays)


def check(arrays, routes):
    """Outputs and all gradients: every product's operands and results are rounded to bfloat16, 1.7e-3 each."""
    got = run(low(arrays), routes, "hopper")
    assert all(a.dtype == jnp.bfloat16 for a in got)
    want = run(tuple(a.astype(jnp.float32) for a in low(arrays)), routes, "reference")
    assert_close([a.astype(jnp.float32) for a in got], want, tolerance=5e-3)


@needs_newer_interpreter
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner"),
    [
        (37, 3, 2, 128, 128),
        pytest.param(1, 3, 2, 128, 128, marks=pytest.mark.slow),
        pytest.param(200, 2, 1, 128, 256, marks=pytest.mark.slow),
        pytest.param(150, 3, 3, 256, 128, marks=pytest.mark.slow),
    ],
)
def test_equals_oracle(on_hopper, tokens, experts, k, hidden, inner):
    check(*problem(tokens, experts, k, hidden, inner))


@pytest.mark.slow
@needs_newer_interpreter
@pytest.mark.parametrize(
    "routes",
    [
        pytest.param(np.full((70, 2), 1), id="all to one, twice"),
        pytest.param(np.random.default_rng(1).integers(-3, 6, size=(70, 2)), id="ids out of range"),
    ],
)
def test_unusual_routes(on_hopper, routes):
    check(*problem(len(routes), 3, hidden=128, inner=128, routes=routes))


@needs_newer_interpreter
def test_no_assignment_at_all(on_hopper):
    arrays, routes = problem(2, 3, hidden=128, inner=128, routes=np.array([[-1, 3], [2**31 - 1, -(2**31)]]))
    assert all(not np.asarray(a, np.float32).any() for a in run(low(arrays), routes, "hopper"))


@pytest.mark.parametrize("channels", [128, 1280])
def test_gate_gradient(channels):
    """All that stands between the products, of the rows in use; the others' are not read."""
    rows, used = 7, 5
    rng = np.random.default_rng(channels)
    d_hidden, up, gate = low(jnp.asarray(rng.normal(size=(rows, channels)), jnp.float32) for _ in range(3))
    share = jnp.asarray(rng.uniform(size=rows), jnp.float32)
    unread = jnp.arange(rows)[:, None] >= used
    arrays = (jnp.where(unread, jnp.nan, a) for a in (d_hidden, up, gate))
    d_up, d_gate, hidden, d_share = hopper_gate.gate_gradient(*arrays, share, jnp.array([used]), interpret=True)

    inner, pull = jax.vjp(lambda *a: a[2][:, None] * jax.nn.silu(a[0]) * a[1], *exact((up, gate)), share)
    want = *pull(*exact((d_hidden,))), inner
    for got, exactly in zip((d_up, d_gate, d_share, hidden), want, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32)[:used], exactly[:used], rtol=4e-3, atol=1e-3)


@pytest.mark.slow
@needs_newer_interpreter
def test_vmap(on_hopper):
    (x, w1, w3, w2, weights), routes = problem(8, 2, hidden=128, inner=128)
    x, w1, w3, w2, weights = low((x, w1, w3, w2, weights))
    batched = [a.reshape(2, 4, -1) for a in (x, routes, weights)]
    got = jax.vmap(lambda x, r, w: expert_mlp(x, w1, w3, w2, r, w, implementation="hopper"))(*batched)
    want = reference.forward(*(a.astype(jnp.float32) for a in (x, w1, w3, w2)), routes, weights)
    assert_close([got.reshape(want.shape).astype(jnp.float32)] * 6, [want] * 6, tolerance=5e-3)


@needs_newer_interpreter
def test_reads_the_stacks(on_hopper):
    """This layer's own weights are zeros: they are what gradients belong to, and are not read."""
    arrays, routes = problem(37, 3, 2, 128, 128)
    arrays = low(arrays)
    op = functools.partial(expert_mlp, implementation="hopper")

    def loss(arrays):
        x, w1, w3, w2, weights = arrays
        unread = (jnp.zeros_like(w) for w in (w1, w3, w2))
        stacks = stacked(arrays)[1:4]
        return jnp.sum(op(x, *unread, routes, weights, layer=jnp.int32(2), stacks=stacks).astype(jnp.float32) ** 2)

    x, w1, w3, w2, weights = arrays
    found = jax.grad(lambda own: loss((own[0], w1, w3, w2, own[1])))((x, weights))
    want = jax.grad(lambda own: jnp.sum(op(own[0], w1, w3, w2, routes, own[1]).astype(jnp.float32) ** 2))((x, weights))
    for a, b in zip(found, want):
        np.testing.assert_array_equal(a, b)
    got = jax.grad(lambda a: jnp.sum(beside(routes, op, *a).astype(jnp.float32) ** 2))(arrays)
    wanted = jax.grad(lambda a: jnp.sum(op(*a[:4], routes, a[4]).astype(jnp.float32) ** 2))(arrays)
    for a, b in zip(got, wanted):
        np.testing.assert_array_equal(a, b)


def forward_is_right(arrays, routes, layer=None):
    x, w1, w3, w2, weights = low(arrays if layer is None else stacked(arrays))
    op = functools.partial(expert_mlp, implementation="hopper")
    got = jax.jit(op)(x, w1, w3, w2, routes, weights, layer=layer)
    want = reference.forward(*(a.astype(jnp.float32) for a in low(arrays[:4])), routes, weights.astype(jnp.float32))
    assert_close([got.astype(jnp.float32)] * 6, [want] * 6, tolerance=5e-3)


@needs_newer_interpreter
@pytest.mark.parametrize(
    ("tokens", "layer"), [(9, None), (5, 2), pytest.param(65, 2, marks=pytest.mark.slow), (hopper_few.TOKENS + 1, 2)]
)
def test_forward_alone(on_hopper, tokens, layer):
    """Few tokens and more, with a layer's own weights and with a stack."""
    forward_is_right(*problem(tokens, 3, 2, 128, 128), layer)


@pytest.mark.slow
@needs_newer_interpreter
@pytest.mark.parametrize(
    "routes",
    [
        pytest.param(np.full((7, 2), 1), id="all to one, twice"),
        pytest.param(np.random.default_rng(1).integers(-3, 6, size=(7, 2)), id="ids out of range"),
    ],
)
def test_unusual_routes_of_few_tokens(on_hopper, routes):
    forward_is_right(*problem(7, 3, hidden=256, inner=128, routes=routes))


@needs_newer_interpreter
def test_few_tokens_of_nobody(on_hopper):
    (x, w1, w3, w2, weights), routes = problem(2, 3, hidden=128, inner=128, routes=np.array([[-1, 3], [4, 3]]))
    y = expert_mlp(*low((x, w1, w3, w2)), routes, weights, implementation="hopper")
    assert not np.asarray(y, np.float32).any()


@needs_newer_interpreter
def test_what_an_expert_makes_of_others_tokens_does_not_matter(on_hopper):
    """What goes into the first expert's second product overflows for the second token, which did not choose it."""
    (x, w1, w3, w2, weights), routes = problem(2, 2, 1, 128, 128, routes=np.array([[0], [1]]))
    x = x.at[1].set(1e12)
    w1, w3 = (w.at[0].set(1e12) for w in (w1, w3))
    y = expert_mlp(*low((x, w1, w3, w2)), routes, weights, implementation="hopper")
    assert np.isfinite(np.asarray(y, np.float32)).all()


def test_chosen():
    routes = jnp.array([[3, -1], [1, 3], [7, 3]], jnp.int32)
    weights = jnp.array([[1, 2], [3, 4], [5, 6]], jnp.float32)
    taken, share = hopper_few.chosen(routes, weights, 5)
    assert taken.tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_array_equal(share, [[0, 0, 0], [0, 3, 0], [0, 0, 0], [1, 4, 6], [0, 0, 0]])


@needs_newer_interpreter
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_more_tiles_than_stay_together_and_more_steps_than_stages(monkeypatch, transpose_rhs):
    """Also: the second pair of operands, and tiles that are not used."""
    monkeypatch.setattr(hopper_matmul, "_TOGETHER", 2)
    rng = np.random.default_rng(0)
    experts, used = np.array([1, 1, 0, 2], np.int32), np.array([3], np.int32)
    lhs = [jnp.asarray(rng.normal(size=(512, 192)), jnp.bfloat16) for _ in range(2)]
    rhs = [jnp.asarray(rng.normal(size=(3, 192, 128)), jnp.bfloat16) for _ in range(2)]
    given = [b.mT for b in rhs] if transpose_rhs else rhs
    options = dict(transpose_rhs=transpose_rhs, interpret=True)
    (out,) = hopper_matmul.rows_product(lhs, given, jnp.asarray(experts), jnp.asarray(used), **options)
    matrices = [np.asarray(b, np.float32)[experts.repeat(128)] for b in rhs]
    want = np.sum([np.einsum("pk,pkn->pn", np.asarray(a, np.float32), b) for a, b in zip(lhs, matrices)], axis=0)
    error = np.asarray(out, np.float32)[:384] - want[:384]
    assert np.sqrt(np.mean(error**2) / np.mean(want**2)) <= 3e-3


def test_says_why_it_cannot_run(monkeypatch):
    arrays, routes = problem(4, 3)
    with pytest.raises(ValueError, match="'hopper' cannot run here: it needs an NVIDIA Hopper GPU"):
        run(low(arrays), routes, "hopper")
    monkeypatch.setattr(_hopper, "missing", lambda: None)
    with pytest.raises(ValueError, match=r"must be bfloat16.*TF32.*got float32"):
        run(arrays, routes, "hopper")
    with pytest.raises(ValueError, match="multiples of 128: got 32 and 48"):
        run(low(arrays), routes, "hopper")
