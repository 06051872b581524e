"""What every implementation of the projections must pass: a subclass names it and inherits the tests."""

import functools
import importlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import Projection, project

CASES = ((1, 128), (64, 256), (70, 128))
"""Tokens, width."""


class Suite:
    """The tests of one implementation."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    """Keyword arguments of the implementation's project."""
    cases: ClassVar[tuple] = CASES

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        """Lets the op run the implementation here, with its options."""
        module = importlib.import_module(f"pallas_kernels.projections.{self.implementation}")
        monkeypatch.setattr(module, "project", functools.partial(module.project, **self.options))
        monkeypatch.setattr(module, "unsupported", lambda *arguments: None)

    def test_equals_the_truth(self, case):
        """Three of them, one dealt out to queries, keys and values of two heads."""
        tokens, width = case
        random = np.random.default_rng(0)
        x = random.standard_normal((tokens, width)).astype(ml_dtypes.bfloat16)
        stacks = [
            (random.standard_normal((2, rows, width)) / width**0.5).astype(ml_dtypes.bfloat16)
            for rows in (3 * 2 * 64, 64, 128)
        ]

        def op(x, a, b, c, layer):
            several = [Projection(a, "silu", 3, 64), Projection(b, "sigmoid"), Projection(c)]
            return project(x, several, layer, implementation=self.implementation)

        found = jax.jit(op)(x, *stacks, jnp.int32(1))
        assert {a.dtype for a in found} == {jnp.bfloat16.dtype}
        qkv, gate, plain = (x.astype(np.float64) @ w[1].astype(np.float64).T for w in stacks)
        qkv = (qkv / (1 + np.exp(-qkv))).reshape(tokens, 2, 3, 64)
        truths = [*(qkv[:, :, i].reshape(tokens, -1) for i in range(3)), 1 / (1 + np.exp(-gate)), plain]
        for result, truth in zip(found, truths, strict=True):
            np.testing.assert_allclose(np.asarray(result, np.float64), truth, rtol=1.5e-2, atol=4e-3)
