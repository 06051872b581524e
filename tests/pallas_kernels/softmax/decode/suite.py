"""What every implementation of softmax attention over pages must pass: a subclass names it and inherits the tests.

Everything goes through the public op. The truth is written out in float64.
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

from pallas_kernels import softmax_attention_decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One set of shapes; a page table with room for `n` pages a sequence."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    size: int
    page_size: int
    n: int

    def __str__(self):
        return f"B{len(self.lengths)}-H{self.heads}x{self.kv_heads}-d{self.size}-{self.n}x{self.page_size}"


CASES = (
    Case(lengths=(1,), heads=1, kv_heads=1, size=64, page_size=64, n=1),
    Case(lengths=(130, 0, 384, 1), heads=4, kv_heads=2, size=64, page_size=128, n=3),
    Case(lengths=(300, 64), heads=8, kv_heads=1, size=128, page_size=64, n=5),
    Case(lengths=(1000, 0, 513), heads=6, kv_heads=2, size=64, page_size=1024, n=1),
    Case(lengths=(77, 5, 80), heads=4, kv_heads=4, size=32, page_size=16, n=5),
    Case(lengths=(0, 0), heads=2, kv_heads=1, size=64, page_size=64, n=2),
)


@functools.cache
def problem(case: Case):
    """q, keys, values (bfloat16's numbers in float32), pages, lengths, and the truth.

    No number stands where no token is: in pages that belong to nobody, and behind the end of a sequence.
    """
    random = np.random.default_rng(0)
    batch, n, page_size = len(case.lengths), case.n, case.page_size
    count = batch * n + 2

    def normal(*shape):
        return random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)

    q = normal(batch, case.heads, case.size)
    pages = random.permutation(count)[: batch * n].reshape(batch, n).astype(np.int32)
    keys, values = (np.full((count, page_size, case.kv_heads, case.size), np.nan, np.float32) for _ in range(2))
    truth = np.zeros(q.shape)
    for row, length in enumerate(case.lengths):
        k, v = (normal(length, case.kv_heads, case.size) for _ in range(2))
        for place in range(length):
            page = pages[row, place // page_size]
            keys[page, place % page_size], values[page, place % page_size] = k[place], v[place]
        # Nothing says which page is behind the last token's.
        pages[row, -(-length // page_size) :] = -7
        if length:
            group = case.heads // case.kv_heads
            k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
            scores = np.einsum("hd,shd->hs", q[row], k) / np.sqrt(case.size)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            truth[row] = np.einsum("hs,shd->hd", weights / weights.sum(1, keepdims=True), v)
    return (q, keys, values, pages, np.array(case.lengths, np.int32)), truth


class DecodeSuite:
    """The tests of one implementation; see the module's docstring."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    """Keyword arguments of the implementation's decode."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    tolerances: ClassVar[dict[str, float]] = {"float32": 1e-5, "bfloat16": 4e-3}
    """Relative RMS error."""
    several = CASES[1]
    """For the tests of stacks and shard_map."""

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
            module = importlib.import_module(f"pallas_kernels.softmax.decode.{self.implementation}")
            monkeypatch.setattr(module, "decode", functools.partial(module.decode, **self.options))
            monkeypatch.setattr(module, "unsupported", lambda *arrays: None)

    def op(self, *arrays):
        return softmax_attention_decode(*arrays, implementation=self.implementation)

    def check(self, case: Case, dtype: str, op):
        """op has the op's signature."""
        (q, keys, values, pages, lengths), truth = problem(case)
        q, keys, values = (jnp.asarray(x, dtype) for x in (q, keys, values))
        o = jax.jit(op)(q, keys, values, pages, lengths)
        assert o.dtype == dtype
        assert o.shape == truth.shape
        o = np.asarray(o, np.float64)
        assert not o[lengths == 0].any()
        error, scale = (np.sqrt(np.square(x).mean()) for x in (o - truth, truth))
        assert error <= self.tolerances[dtype] * scale, f"relative RMS error {error / scale:.2e}"

    def test_equals_the_truth(self, case, dtype):
        self.check(case, dtype, self.op)

    def test_a_layer_of_a_stack(self):
        def op(q, keys, values, pages, lengths):
            stacks = (jnp.stack([jnp.full_like(x, jnp.nan), x]) for x in (keys, values))
            count = keys.shape[0]
            return self.op(q, *(x.reshape(-1, *x.shape[2:]) for x in stacks), pages + count, lengths)

        self.check(self.several, self.dtypes[-1], op)

    @pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
    def test_shard_map(self):
        """Sequences over one mesh axis, each with a pool of its own; heads over another."""
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        rows, pool = P("data", "tensor"), P("data", None, "tensor")

        def op(q, keys, values, pages, lengths):
            def local(q, keys, values, pages, lengths):
                return self.op(q, keys, values, pages - jax.lax.axis_index("data") * keys.shape[0], lengths)

            twice = (jnp.concatenate([x, x]) for x in (keys, values))
            half = len(lengths) // 2
            pages = pages + jnp.repeat(jnp.arange(2, dtype=jnp.int32), half)[:, None] * keys.shape[0]
            sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, pool, pool, P("data"), P("data")), out_specs=rows)
            return sharded(q, *twice, pages, lengths)

        self.check(self.several, self.dtypes[-1], op)
