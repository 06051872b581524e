"""The Hopper kernel in Pallas' interpreter on CPU, with race detection; test_hopper_compiled.py compiles it."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Projection, _hopper, project
from tests.pallas_kernels.projections.suite import Suite


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10.2 interprets no transposed operands")
class TestHopper(Suite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}


@pytest.mark.parametrize(
    ("tokens", "width", "rows", "dtype", "message"),
    [
        (4, 128, 64, "float32", "bfloat16: the matrix units would quietly round float32"),
        (257, 128, 64, "bfloat16", "1 to 256 tokens: got 257"),
        (4, 96, 64, "bfloat16", "hidden sizes that are multiples of 128: got 96"),
        (4, 128, 96, "bfloat16", "multiples of 64 channels: got 96"),
    ],
)
def test_says_what_it_takes(monkeypatch, tokens, width, rows, dtype, message):
    monkeypatch.setattr(_hopper, "missing", lambda: None)
    x, weights = jnp.zeros((tokens, width), dtype), jnp.zeros((1, rows, width), dtype)
    with pytest.raises(ValueError, match=f"'hopper' cannot run here: it takes {message}"):
        project(x, [Projection(weights)], 0, implementation="hopper")
