"""What every implementation of the vocabulary's scores must pass: a subclass names it and inherits the tests."""

import functools
import importlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import target, vocabulary_scores

CASES = ((1, 8, 128), (3, 200, 256), (130, 264, 128))
"""Tokens, words, width."""


class Suite:
    """The tests of one implementation."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    """Keyword arguments of the implementation's scores."""
    platform: ClassVar[str] = "gpu"
    cases: ClassVar[tuple] = CASES

    def pytest_generate_tests(self, metafunc):
        metafunc.parametrize("case", self.cases, ids=str)

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        """Lets the op run the implementation here, with its options."""
        module = importlib.import_module(f"pallas_kernels.vocabulary.scores.{self.implementation}")
        monkeypatch.setattr(target, "target_platform", lambda: self.platform)
        monkeypatch.setattr(module, "scores", functools.partial(module.scores, **self.options))
        monkeypatch.setattr(module, "unsupported", lambda *arrays: None)

    def test_equals_the_truth(self, case):
        tokens, words, width = case
        random = np.random.default_rng(0)
        hidden = random.standard_normal((tokens, width)).astype(ml_dtypes.bfloat16)
        weight = (random.standard_normal((words, width)) / width**0.5).astype(np.float32)
        op = functools.partial(vocabulary_scores, implementation=self.implementation)
        result = jax.jit(op)(hidden, weight)
        assert result.dtype == jnp.float32
        truth = hidden.astype(np.float64) @ weight.astype(np.float64).T
        np.testing.assert_allclose(np.asarray(result, np.float64), truth, rtol=0, atol=5e-6)
