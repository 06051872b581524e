"""What every implementation of the norms must pass: a subclass names it and inherits the tests."""

import functools
import importlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import Norm, normed


class Suite:
    """The tests of one implementation."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    """Keyword arguments of the implementation's normed."""

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize(("tokens", "width", "factors"), [(1, 128, (1.0,)), (3, 640, (3.5, 1.25))])
    def test_equals_the_truth(self, monkeypatch, tokens, width, factors, gated):
        module = importlib.import_module(f"pallas_kernels.norms.{self.implementation}")
        monkeypatch.setattr(module, "normed", functools.partial(module.normed, **self.options))
        monkeypatch.setattr(module, "unsupported", lambda *arguments: None)
        random = np.random.default_rng(0)
        *terms, gate, weights = (
            random.standard_normal((n, width)).astype(ml_dtypes.bfloat16)
            for n in (*(tokens for _ in factors), tokens, 3)
        )

        def op(terms, gate, weights, layer):
            pairs = list(zip(terms, factors, strict=True))
            return normed(pairs, Norm(weights, 0.1), layer, gate=gate, implementation=self.implementation)

        result = jax.jit(op)(terms, gate if gated else None, weights, jnp.int32(2))
        assert result.dtype == jnp.bfloat16
        x = sum(a.astype(np.float64) * factor for a, factor in zip(terms, factors, strict=True))
        truth = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 0.1) * weights[2].astype(np.float64)
        truth = truth * gate.astype(np.float64) if gated else truth
        np.testing.assert_allclose(np.asarray(result, np.float64), truth, rtol=3e-2, atol=1e-2)
