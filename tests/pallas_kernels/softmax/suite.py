"""What every implementation of softmax attention must pass: a subclass names it and inherits the tests.

    class TestBlocked(Suite):
        implementation = "blocked"

Everything goes through the public op. The truth is written out in float64, gradients included.
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

from pallas_kernels import PADDING, softmax_attention

NAMES = ("o", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One set of shapes. `rows`: the segments' lengths of each row, `-n` for n tokens of padding."""

    length: int
    heads: int
    kv_heads: int
    size: int
    keys: int | None = None  # of a cache; None: as many as queries
    starts: tuple[int, ...] | None = None  # q_start
    rows: tuple[tuple[int, ...], ...] | None = None

    def __str__(self):
        where = "" if self.rows is None else "-packed"
        where += "" if self.starts is None else f"-cache{self.keys}"
        return f"T{self.length}-H{self.heads}x{self.kv_heads}-d{self.size}{where}"

    @property
    def batch(self) -> int:
        return len(self.rows or self.starts or (0,))

    @property
    def where(self) -> dict[str, np.ndarray]:
        """The keyword arguments that say which keys a query sees. Ids have gaps and begin below zero."""
        if self.starts is not None:
            return {"q_start": np.array(self.starts, np.int32)}
        if self.rows is None:
            return {}
        ids = [[PADDING if n < 0 else 3 * i - 4 for i, n in enumerate(row) for _ in range(abs(n))] for row in self.rows]
        return {"segment_ids": np.array(ids, np.int32)}


CASES = (
    Case(length=1, heads=1, kv_heads=1, size=64),
    Case(length=63, heads=4, kv_heads=4, size=64),
    Case(length=257, heads=8, kv_heads=1, size=64),
    Case(length=257, heads=4, kv_heads=2, size=64, rows=((1, 1, 30, 180, 5, -40), (257,), (100, 157))),
    Case(length=130, heads=4, kv_heads=2, size=128, rows=((64, 64, 2), (-130,), (63, 2, 63, -2))),
    Case(length=1000, heads=4, kv_heads=1, size=128),
    Case(length=1, heads=4, kv_heads=2, size=64, keys=300, starts=(17, 299, 0)),
    Case(length=100, heads=2, kv_heads=1, size=64, keys=300, starts=(0, 200)),
)


@functools.cache
def problem(case: Case):
    """q, k, v, do as float32 arrays whose values are bfloat16's, and the truth."""
    random = np.random.default_rng(0)
    queries = (case.batch, case.length, case.heads, case.size)
    keys = (case.batch, case.keys or case.length, case.kv_heads, case.size)

    def normal(shape):
        return random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)

    arrays = tuple(normal(shape) for shape in (queries, keys, keys, queries))
    return arrays, float64_attention(*arrays, **case.where)


def float64_attention(q, k, v, do, segment_ids=None, q_start=0):
    """(o, dq, dk, dv), all scores written out."""
    q, k, v, do = (x.astype(np.float64) for x in (q, k, v, do))
    batch, length, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    q, do = (x.reshape(batch, length, kv_heads, -1, size) for x in (q, do))
    place = np.reshape(q_start, (-1, 1, 1)) + np.arange(length)[:, None]
    seen = np.broadcast_to(place >= np.arange(keys), (batch, length, keys)).copy()
    if segment_ids is not None:
        seen &= (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids != PADDING)[:, None]
    scores = np.einsum("bthgd,bshd->bhgts", q, k) / np.sqrt(size)
    weights = np.exp(scores) * seen[:, None, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    o = np.einsum("bhgts,bshd->bthgd", weights, v)
    d_weights = np.einsum("bthgd,bshd->bhgts", do, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(size)
    dq = np.einsum("bhgts,bshd->bthgd", d_scores, k)
    dk = np.einsum("bhgts,bthgd->bshd", d_scores, q)
    dv = np.einsum("bhgts,bthgd->bshd", weights, do)
    return *(x.reshape(batch, length, heads, size) for x in (o, dq)), dk, dv


class Suite:
    """The tests of one implementation; see the module's docstring."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    """Keyword arguments of the implementation's attention."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    tolerances: ClassVar[dict[str, float]] = {"float32": 1e-5, "bfloat16": 4e-3}
    """Relative RMS error. In bfloat16 the scaled queries, weights, their gradients and results are each rounded."""
    check_vma: ClassVar[bool] = True
    """Whether it runs inside a shard_map that checks over which axes arrays differ."""
    packed: ClassVar[bool] = True
    """Whether it takes segment_ids."""

    def bears(self, case: Case) -> bool:
        """Whether the implementation takes the case."""
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
            module = importlib.import_module(f"pallas_kernels.softmax.{self.implementation}")
            monkeypatch.setattr(module, "attention", functools.partial(module.attention, **self.options))
            monkeypatch.setattr(module, "unsupported", lambda *arrays: None)

    def op(self, q, k, v, **where):
        return softmax_attention(q, k, v, implementation=self.implementation, **where)

    def check(self, case: Case, dtype: str, op):
        """op has the op's signature."""
        (q, k, v, do), truths = problem(case)
        q, k, v, do = (jnp.asarray(x, dtype) for x in (q, k, v, do))

        @jax.jit
        def with_gradients(q, k, v, do, where):
            o, transposed = jax.vjp(lambda q, k, v: op(q, k, v, **where), q, k, v)
            return o, *transposed(do)

        for name, result, truth in zip(NAMES, with_gradients(q, k, v, do, case.where), truths, strict=True):
            assert result.dtype == dtype, name
            assert result.shape == truth.shape, name
            result = np.asarray(result, np.float64)
            error, scale = (np.sqrt(np.square(x).mean()) for x in (result - truth, truth))
            assert error <= self.tolerances[dtype] * max(scale, 1e-3), f"{name}: relative RMS error {error / scale:.2e}"
            if case.rows is not None:
                assert not result[case.where["segment_ids"] == PADDING].any(), f"{name} of padding"

    def test_equals_the_truth(self, case, dtype):
        self.check(case, dtype, self.op)

    def two_rows(self):
        rows = ((30, 57, -9), (96,)) if self.packed else None
        return Case(length=96, heads=4, kv_heads=2, size=64, rows=rows)

    def test_vmap(self):
        def op(q, k, v, **where):
            def one(q, k, v, where):
                return self.op(q[None], k[None], v[None], **{name: x[None] for name, x in where.items()})[0]

            return jax.vmap(one)(q, k, v, where)

        self.check(self.two_rows(), self.dtypes[-1], op)

    @pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
    def test_shard_map(self):
        """Rows over one mesh axis, heads over another."""
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        tokens = P("data" if self.packed else None, None, "tensor")

        def op(q, k, v, **where):
            def local(q, k, v, where):
                return self.op(q, k, v, **where)

            sharded = jax.shard_map(
                local, mesh=mesh, in_specs=(*[tokens] * 3, P("data")), out_specs=tokens, check_vma=self.check_vma
            )
            return sharded(q, k, v, where)

        self.check(self.two_rows(), self.dtypes[-1], op)
