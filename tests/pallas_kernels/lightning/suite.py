"""What every implementation of lightning attention must pass: a subclass names it and inherits the tests.

    class TestChunked(Suite):
        implementation = "chunked"

Everything goes through the public op, with `options` (such as interpret=True) given to the implementation's forward and
backward. The truth is the recurrence in float64, gradients included.
"""

import dataclasses
import functools
import importlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import PADDING, lightning_attention, lightning_attention_decode

NAMES = ("o", "final_state", "dq", "dk", "dv", "d_initial_state")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One set of shapes and decays. `rows`: the segments' lengths of each row, `~n` for n tokens of padding."""

    length: int
    heads: int
    key_size: int
    value_size: int | None = None  # None: key_size
    slopes: str = "layer 0"
    rows: tuple[tuple[int, ...], ...] | None = None  # None: one row without segment ids
    initial: bool = False

    def __str__(self):
        size = f"{self.key_size}" if self.value_size is None else f"{self.key_size}x{self.value_size}"
        rows = "" if self.rows is None else f"-packed{len(self.rows)}"
        return f"T{self.length}-H{self.heads}-d{size}-{self.slopes}{rows}{'-initial' if self.initial else ''}"

    @property
    def batch(self) -> int:
        return 1 if self.rows is None else len(self.rows)

    @property
    def segment_ids(self) -> np.ndarray | None:
        """[B,T] int32. Ids have gaps and begin below zero: only their order may matter."""
        if self.rows is None:
            return None
        ids = [[PADDING if n < 0 else 3 * i - 4 for i, n in enumerate(row) for _ in range(abs(n))] for row in self.rows]
        return np.array(ids, np.int32)

    @property
    def log_decay(self) -> np.ndarray:
        """[H] float32. Of M1's 64 heads in a layer the slowest, and so on in equal steps to the fastest."""
        if self.slopes == "extreme":
            slopes = np.resize([0.0, 1e4, 90.0, 1e-6, 5.0, 0.5], self.heads)
        else:
            head = np.linspace(63, 0, self.heads).round() + 1
            slopes = 2.0 ** (-8 * head / 64) * (1 - int(self.slopes.removeprefix("layer ")) / 79 + 1e-5)
        return -slopes.astype(np.float32)


def random_row(length: int, seed: int, padding: int = 0) -> tuple[int, ...]:
    """Segments of random lengths, short and long ones, and then padding."""
    random, row = np.random.default_rng(seed), []
    while sum(row) < length - padding:
        row.append(min(int(2 ** random.uniform(0, 9)), length - padding - sum(row)))
    return (*row, -padding) if padding else tuple(row)


CASES = (
    Case(length=1, heads=1, key_size=64, initial=True),
    Case(length=1, heads=6, key_size=128, slopes="layer 40"),
    Case(length=63, heads=64, key_size=128, slopes="layer 40", initial=True),
    Case(length=64, heads=6, key_size=64),
    Case(length=64, heads=64, key_size=64, slopes="layer 78", rows=((5, 59),), initial=True),
    Case(length=70, heads=6, key_size=64, rows=((1,) * 70,), initial=True),
    Case(length=130, heads=2, key_size=64, value_size=128, slopes="layer 40", rows=((40, 80, -10),), initial=True),
    Case(length=256, heads=6, key_size=128, initial=True),
    Case(length=256, heads=1, key_size=64, slopes="layer 40", rows=((256,), (30, -226), (-256,)), initial=True),
    Case(length=256, heads=6, key_size=64, slopes="extreme", rows=((100, 1, 90, 65),), initial=True),
    Case(length=320, heads=6, key_size=64, slopes="layer 78", rows=((64, 64, 128, -64), (63, 2, 127, 128))),
    Case(length=1000, heads=6, key_size=64, slopes="extreme", initial=True),
    Case(length=1000, heads=6, key_size=128, slopes="layer 78", rows=(random_row(1000, 0, padding=37),), initial=True),
    Case(length=4097, heads=1, key_size=128, slopes="layer 78", initial=True),
    Case(length=4097, heads=6, key_size=64, rows=(random_row(4097, 1),)),
)


@functools.cache
def problem(case: Case):
    """q, k, v, initial_state, do, d_final_state as float32 arrays whose values are bfloat16's, and the truth."""
    random = np.random.default_rng(0)
    value_size = case.key_size if case.value_size is None else case.value_size
    tokens, state = (case.batch, case.length, case.heads), (case.batch, case.heads, case.key_size, value_size)

    def normal(*shape):
        return random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)

    q, k, v, do = (normal(*tokens, size) for size in (case.key_size, case.key_size, value_size, value_size))
    initial_state, d_final_state = normal(*state) * case.initial, normal(*state)
    arrays = (q, k, v, initial_state, do, d_final_state)
    return arrays, float64_recurrence(*arrays, case.log_decay, case.segment_ids)


def float64_recurrence(q, k, v, initial_state, do, d_final_state, log_decay, segment_ids):
    """(o, final_state, dq, dk, dv, d_initial_state): the recurrence and its gradients, token by token."""
    batch, length, heads, _ = q.shape
    q, k, v, do = (np.moveaxis(x.astype(np.float64), 1, 0) for x in (q, k, v, do))
    decay = np.broadcast_to(np.exp(log_decay.astype(np.float64)), (length, batch, heads)).copy()
    real = np.ones((length, batch), bool)
    if segment_ids is not None:
        real = (segment_ids != PADDING).T
        decay[1:][(segment_ids[:, 1:] != segment_ids[:, :-1]).T] = 0
        decay[~real] = 1
    k, v, q, do = (x * real[..., None, None] for x in (k, v, q, do))
    decay = decay[..., None, None]
    state = initial_state.astype(np.float64)
    o, dq, dk, dv = np.empty_like(v), np.empty_like(q), np.empty_like(k), np.empty_like(v)
    for t in range(length):
        state = decay[t] * state
        state += k[t][..., :, None] * v[t][..., None, :]
        o[t] = (q[t][..., None, :] @ state)[..., 0, :]
        dq[t] = (state @ do[t][..., :, None])[..., 0]
    d_state = d_final_state.astype(np.float64)
    for t in reversed(range(length)):
        d_state += q[t][..., :, None] * do[t][..., None, :]
        dk[t] = (d_state @ v[t][..., :, None])[..., 0]
        dv[t] = (k[t][..., None, :] @ d_state)[..., 0, :]
        d_state = decay[t] * d_state
    o, dq, dk, dv = (np.moveaxis(x, 0, 1) for x in (o, dq, dk, dv))
    return o, state, dq, dk, dv, d_state


def assert_close(name, result, truth, tolerance):
    """Root mean square of the error of each head within `tolerance` of that of the truth."""
    result = np.asarray(result, np.float64)
    assert result.shape == truth.shape, name
    axes = (0, 1, 3) if name in ("o", "dq", "dk", "dv") else (0, 2, 3)
    error, size = (np.sqrt(np.square(x).mean(axes)) for x in (result - truth, truth))
    # What float32 can hardly hold (a fast head's gradient of the initial state) counts as zero.
    worst = np.max(error / np.maximum(size, 1e-20 / tolerance), initial=0)
    assert worst <= tolerance, f"{name}: relative RMS error {worst:.2e} in head {np.argmax(error / size)}"


class Suite:
    """The tests of one implementation; see the module's docstring."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    """Keyword arguments of the implementation's forward and backward."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    tolerances: ClassVar[dict[str, float]] = {"float32": 1e-5, "bfloat16": 3e-3}
    """Relative RMS error per head."""
    small: ClassVar[dict] = {"length": 96, "heads": 2, "key_size": 64}
    """Shapes for the tests of vmap and shard_map."""

    def bears(self, case: Case) -> bool:
        """Whether the implementation takes the case, and quickly enough (an interpreter may not)."""
        return True

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", [case for case in CASES if self.bears(case)], ids=str)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        """Lets the op run the implementation here, with its options."""
        if self.options:
            module = importlib.import_module(f"pallas_kernels.lightning.{self.implementation}")
            for name in ("forward", "backward"):
                monkeypatch.setattr(module, name, functools.partial(getattr(module, name), **self.options))
            monkeypatch.setattr(module, "unsupported", lambda q, k, v: None)

    def run(self, case: Case, dtype: str, op=None):
        """(o, final_state, dq, dk, dv, d_initial_state) of the op, or of `op` with its signature but for keywords."""
        (q, k, v, initial_state, do, d_final_state), _ = problem(case)

        def default(q, k, v, log_decay, initial_state, segment_ids):
            return lightning_attention(
                q,
                k,
                v,
                log_decay,
                initial_state=initial_state,
                segment_ids=segment_ids,
                implementation=self.implementation,
            )

        @jax.jit
        def with_gradients(q, k, v, initial_state, do, d_final_state, log_decay, segment_ids):
            def differentiable(q, k, v, initial_state):
                return (op or default)(q, k, v, log_decay, initial_state if case.initial else None, segment_ids)

            outputs, transposed = jax.vjp(differentiable, q, k, v, initial_state)
            return *outputs, *transposed((do, d_final_state))

        q, k, v, do = (jnp.asarray(x, dtype) for x in (q, k, v, do))
        return with_gradients(q, k, v, initial_state, do, d_final_state, case.log_decay, case.segment_ids)

    def check(self, case: Case, dtype: str, results):
        _, truths = problem(case)
        for name, result, truth in zip(NAMES, results, truths, strict=True):
            if name == "d_initial_state" and not case.initial:
                continue
            expected = "float32" if name in ("final_state", "d_initial_state") else dtype
            assert result.dtype == expected, name
            assert_close(name, result, truth, self.tolerances[dtype])
            if case.segment_ids is not None and name in ("o", "dq", "dk", "dv"):
                assert not np.asarray(result, np.float32)[case.segment_ids == PADDING].any(), f"{name} of padding"

    def test_equals_the_recurrence(self, case, dtype):
        self.check(case, dtype, self.run(case, dtype))

    def test_log_decay_has_no_gradient(self):
        case = Case(**self.small)
        (q, k, v, *_), _ = problem(case)
        q, k, v = (jnp.asarray(x, self.dtypes[0]) for x in (q, k, v))

        def total(log_decay):
            return lightning_attention(q, k, v, log_decay, implementation=self.implementation)[1].sum()

        assert not np.asarray(jax.grad(total)(jnp.asarray(case.log_decay))).any()

    @pytest.mark.parametrize("packed", [False, True])
    def test_vmap(self, packed):
        rows = (random_row(self.small["length"], 2, padding=9), random_row(self.small["length"], 3))
        case = Case(**self.small, rows=rows if packed else None, initial=packed)

        def op(q, k, v, log_decay, initial_state, segment_ids):
            def one(q, k, v, initial_state, segment_ids):
                arguments = {"initial_state": initial_state, "segment_ids": segment_ids}
                arguments = {name: x if x is None else x[None] for name, x in arguments.items()}
                o, state = lightning_attention(
                    q[None], k[None], v[None], log_decay, implementation=self.implementation, **arguments
                )
                return o[0], state[0]

            return jax.vmap(one)(q, k, v, initial_state, segment_ids)

        self.check(case, self.dtypes[0], self.run(case, self.dtypes[0], op))

    def test_shard_map(self):
        """Rows over one mesh axis, heads over another."""
        rows = (random_row(self.small["length"], 2, padding=9), random_row(self.small["length"], 3))
        case = Case(**self.small, rows=rows, initial=True)
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        tokens, state = P("data", None, "tensor"), P("data", "tensor")

        def op(q, k, v, log_decay, initial_state, segment_ids):
            def local(q, k, v, log_decay, initial_state, segment_ids):
                return lightning_attention(
                    q,
                    k,
                    v,
                    log_decay,
                    initial_state=initial_state,
                    segment_ids=segment_ids,
                    implementation=self.implementation,
                )

            specs = (tokens, tokens, tokens, P("tensor"), state, P("data"))
            sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(tokens, state))
            return sharded(q, k, v, log_decay, initial_state, segment_ids)

        self.check(case, self.dtypes[0], self.run(case, self.dtypes[0], op))


class DecodeSuite:
    """The tests of one implementation of the decode op; a subclass names it."""

    implementation: ClassVar[str]
    module: ClassVar[str]
    """The module under pallas_kernels.lightning whose `decode` it is."""
    options: ClassVar[dict] = {}
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    tolerances: ClassVar[dict[str, float]] = {"float32": 1e-5, "bfloat16": 3e-3}
    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((1, 1, 64), (3, 6, 64), (17, 2, 128), (256, 1, 64))
    """(sequences, heads, head size)"""

    def pytest_generate_tests(self, metafunc):
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", self.shapes, ids=lambda s: "N{}-H{}-d{}".format(*s))
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        if self.options:
            module = importlib.import_module(f"pallas_kernels.lightning.{self.module}")
            monkeypatch.setattr(module, "decode", functools.partial(module.decode, **self.options))
            monkeypatch.setattr(module, "unsupported", lambda q, k, v: None)

    def test_advances_the_pool(self, shape, dtype):
        """Sequences in any order, every third one idle, in a pool with rows to spare, which stay as they are."""
        sequences, heads, size = shape
        random = np.random.default_rng(0)
        tokens = [
            random.standard_normal((sequences, heads, size), np.float32).astype(ml_dtypes.bfloat16) for _ in range(3)
        ]
        pool = random.standard_normal((sequences + 2, heads, size, size), np.float32)
        slots = random.permutation(sequences + 2)[:sequences].astype(np.int32)
        slots[1::3] = -1 - slots[1::3]
        log_decay = Case(length=1, heads=heads, key_size=size, slopes="layer 40").log_decay

        q, k, v = (x.astype(np.float64) for x in tokens)
        truth_pool, truth_o = pool.astype(np.float64), np.zeros_like(v)
        for n, slot in enumerate(slots):
            if slot >= 0:
                state = np.exp(log_decay.astype(np.float64))[:, None, None] * truth_pool[slot]
                truth_pool[slot] = state + k[n][:, :, None] * v[n][:, None, :]
                truth_o[n] = (q[n][:, None, :] @ truth_pool[slot])[:, 0]

        q, k, v = (jnp.asarray(x, dtype) for x in tokens)
        op = functools.partial(lightning_attention_decode, implementation=self.implementation)
        o, new_pool = jax.jit(op, donate_argnums=4)(q, k, v, log_decay, jnp.asarray(pool), slots)
        assert o.dtype == dtype
        assert new_pool.dtype == np.float32
        assert_close("o", np.asarray(o, np.float32)[:, None], truth_o[:, None], self.tolerances[dtype])
        assert_close("final_state", new_pool, truth_pool, self.tolerances[dtype])
        assert not np.asarray(o, np.float32)[slots < 0].any()
        untouched = np.setdiff1d(np.arange(sequences + 2), slots)
        np.testing.assert_array_equal(np.asarray(new_pool)[untouched], pool[untouched])

    def test_one_layer_of_many(self, dtype):
        """Its decays and states among those of all layers; the others' stay as they are."""
        layers, sequences, heads, size = 3, 2, 2, 64
        random = np.random.default_rng(0)
        q, k, v = (jnp.asarray(random.standard_normal((sequences, heads, size)), dtype) for _ in range(3))
        pools = random.standard_normal((layers, sequences + 1, heads, size, size)).astype(np.float32)
        log_decay = -random.uniform(0.01, 0.5, (layers, heads)).astype(np.float32)
        slots = np.array([2, 0], np.int32)
        op = functools.partial(lightning_attention_decode, implementation=self.implementation)
        o, new = jax.jit(op, donate_argnums=4)(q, k, v, log_decay, jnp.asarray(pools), slots, layer=jnp.int32(1))
        want_o, want = jax.jit(op, donate_argnums=4)(q, k, v, log_decay[1], jnp.asarray(pools[1]), slots)
        np.testing.assert_array_equal(np.asarray(o, np.float32), np.asarray(want_o, np.float32))
        np.testing.assert_array_equal(new[1], want)
        np.testing.assert_array_equal(np.asarray(new)[[0, 2]], pools[[0, 2]])

    def test_decay_near_one(self):
        """As in M1's late layers: what a rounded lam loses, it loses to the same side in each of thousands of steps."""
        slopes = np.array([1e-3, 4.95e-5, 1e-5, 1e-6], np.float32)
        pool = np.random.default_rng(0).uniform(0.5, 2, (1, len(slopes), 64, 64)).astype(np.float32)
        nothing = jnp.zeros((1, len(slopes), 64))
        op = functools.partial(lightning_attention_decode, implementation=self.implementation)
        _, new = jax.jit(op, donate_argnums=4)(
            nothing, nothing, nothing, -slopes, jnp.asarray(pool), np.zeros(1, np.int32)
        )
        lost = 1 - (np.asarray(new, np.float64) / pool).mean((0, 2, 3))
        # The mean over 4,096 numbers, each rounded once to 2^-24 at most.
        np.testing.assert_allclose(lost, -np.expm1(-slopes.astype(np.float64)), rtol=0, atol=3e-9)
