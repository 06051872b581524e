"""The Hopper kernel in Pallas' interpreter on CPU, with race detection; test_hopper_compiled.py compiles it."""

from typing import ClassVar

import jax.numpy as jnp
import pytest

from pallas_kernels import Norm, _hopper, normed
from tests.pallas_kernels.norms.suite import Suite


class TestHopper(Suite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}


def test_says_why_not():
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, and this program is for cpu"):
        normed([(jnp.zeros((4, 512)), 1.0)], Norm(jnp.ones((1, 512)), 1e-5), 0, implementation="hopper")


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (512, "float32", "bfloat16: got float32"),
        (96, "bfloat16", "multiples of 128 channels, up to 8192: got 96"),
        (8320, "bfloat16", "multiples of 128 channels, up to 8192: got 8320"),
    ],
)
def test_says_what_it_takes(monkeypatch, width, dtype, message):
    monkeypatch.setattr(_hopper, "missing", lambda: None)
    with pytest.raises(ValueError, match=f"'hopper' cannot run here: it takes {message}"):
        normed([(jnp.zeros((4, width), dtype), 1.0)], Norm(jnp.ones((1, width)), 1e-5), 0, implementation="hopper")
