"""What every implementation of the routes must pass: a subclass names it and inherits the tests."""

import functools
import importlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import expert_routes


class Suite:
    """The tests of one implementation."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    """Keyword arguments of the implementation's routes."""

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        """Lets the op run the implementation here, with its options."""
        module = importlib.import_module(f"pallas_kernels.experts.routes.{self.implementation}")
        monkeypatch.setattr(module, "routes", functools.partial(module.routes, **self.options))
        monkeypatch.setattr(module, "unsupported", lambda *arguments: None)

    def routes(self, x, gates, layer, k):
        op = functools.partial(expert_routes, k=k, implementation=self.implementation)
        return [np.asarray(a) for a in jax.jit(op)(x, gates, layer)]

    @pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 3, 1), (3, 5, 2), (2, 4, 4)])
    def test_equals_the_truth(self, tokens, experts, k):
        random = np.random.default_rng(0)
        x = random.standard_normal((tokens, 1024)).astype(ml_dtypes.bfloat16)
        gates = (random.standard_normal((3, experts, 1024)) / 32).astype(np.float32)
        routes, weights = self.routes(x, gates, jnp.int32(2), k)
        assert (routes.dtype, weights.dtype) == (np.int32, np.float32)
        scores = x.astype(np.float64) @ gates[2].astype(np.float64).T
        truth = np.argsort(-scores, axis=1)[:, :k]
        np.testing.assert_array_equal(routes, truth)
        shares = np.exp(np.take_along_axis(scores, truth, 1))
        np.testing.assert_allclose(weights, shares / shares.sum(1, keepdims=True), rtol=2e-6)

    def test_equals_and_extremes(self):
        """Of equal scores the first; scores too far apart for float32's exponentials."""
        x = np.ones((2, 512), ml_dtypes.bfloat16)
        x[1] = 100
        gates = np.zeros((1, 4, 512), np.float32)
        gates[0, 2:] = 1
        routes, weights = self.routes(x, gates, jnp.int32(0), 3)
        assert routes.tolist() == [[2, 3, 0]] * 2
        np.testing.assert_allclose(weights, [[0.5, 0.5, 0]] * 2, atol=1e-6)
