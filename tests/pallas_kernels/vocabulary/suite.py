"""What every implementation of the vocabulary's statistics must pass: a subclass names it and inherits the tests.

    class TestXla(Suite):
        implementation = "xla"

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

from pallas_kernels import target, vocabulary_statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One set of shapes, and the standard deviation of the scores."""

    tokens: int
    words: int
    width: int
    spread: float = 1.0

    def __str__(self):
        return f"N{self.tokens}-V{self.words}-D{self.width}-x{self.spread}"


CASES = (
    Case(tokens=1, words=1, width=256),
    Case(tokens=130, words=300, width=256),
    Case(tokens=40, words=513, width=512, spread=3.0),
    Case(tokens=20, words=128, width=256, spread=30.0),
)
SCALE = 0.7


@functools.cache
def problem(case: Case):
    """hidden, weight, targets as numpy arrays; log-probability and entropy in float64; where the target is a word."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((case.tokens, case.width)).astype(ml_dtypes.bfloat16)
    weight = random.standard_normal((case.words, case.width)) * case.spread / SCALE / case.width**0.5
    weight = weight.astype(np.float32)
    targets = random.integers(-3, case.words + 3, case.tokens).astype(np.int32)
    scores = SCALE * hidden.astype(np.float64) @ weight.astype(np.float64).T
    top = scores.max(-1)
    mass = np.exp(scores - top[:, None]).sum(-1)
    weighted = (np.exp(scores - top[:, None]) * scores).sum(-1)
    here = (targets >= 0) & (targets < case.words)
    chosen = np.where(here, np.take_along_axis(scores, np.where(here, targets, 0)[:, None], 1)[:, 0], 0)
    return (hidden, weight, targets), (chosen - top - np.log(mass), top + np.log(mass) - weighted / mass), here


class Suite:
    """The tests of one implementation; see the module's docstring."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    """Keyword arguments of the implementation's statistics."""
    platform: ClassVar[str] = "cpu"

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases(), ids=str)

    def cases(self):
        return CASES

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        """Lets the op run the implementation here, with its options."""
        module = importlib.import_module(f"pallas_kernels.vocabulary.{self.implementation}")
        monkeypatch.setattr(target, "target_platform", lambda: self.platform)
        monkeypatch.setattr(module, "statistics", functools.partial(module.statistics, **self.options))
        monkeypatch.setattr(module, "unsupported", lambda *arrays: None)

    def op(self, hidden, weight, targets):
        found, scores = vocabulary_statistics(hidden, weight, targets, scale=SCALE, implementation=self.implementation)
        assert scores is None
        return found

    def check(self, case, op):
        (hidden, weight, targets), truths, here = problem(case)
        found = jax.jit(op)(hidden, weight, targets)
        for name, value in found._asdict().items():
            assert value.dtype == jnp.float32, name
            assert value.shape == (case.tokens,), name
            assert not np.any(np.asarray(value)[~here]) or name != "chosen"
        top, mass, weighted, chosen = (np.asarray(x, np.float64) for x in found)
        normaliser = top + np.log(mass)
        for result, truth in zip((chosen - normaliser, normaliser - weighted / mass), truths, strict=True):
            np.testing.assert_allclose(result, truth, rtol=0, atol=5e-6 * max(1.0, case.spread))

    def test_equals_the_truth(self, case):
        self.check(case, self.op)

    def test_keeps_scores(self, case):
        (hidden, weight, targets), _, _ = problem(case)
        op = functools.partial(vocabulary_statistics, scale=SCALE, implementation=self.implementation, keep_scores=True)
        found, scores = jax.jit(op)(hidden, weight, targets)
        truth = SCALE * hidden.astype(np.float64) @ weight.astype(np.float64).T
        assert scores.dtype == jnp.float32
        np.testing.assert_allclose(scores, truth, rtol=0, atol=5e-6 * max(1.0, case.spread))
        jax.tree.map(np.testing.assert_array_equal, found, jax.jit(self.op)(hidden, weight, targets))

    def test_words_over_devices(self):
        """Parts of the vocabulary add up."""
        mesh = jax.make_mesh((3,), ("words",), axis_types=(jax.sharding.AxisType.Auto,))

        def op(hidden, weight, targets):
            def local(hidden, weight, targets):
                first = jax.lax.axis_index("words") * weight.shape[0]
                return self.op(hidden, weight, targets - first).together("words")

            return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("words"), P()), out_specs=P())(
                hidden, weight, targets
            )

        self.check(CASES[1], op)
