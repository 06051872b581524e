"""The Hopper kernel in Pallas' interpreter on CPU, with race detection; test_hopper_compiled.py compiles it."""

from typing import ClassVar

import jax.numpy as jnp
import pytest

from pallas_kernels import _hopper, expert_routes
from tests.pallas_kernels.experts.routes.suite import Suite


class TestHopper(Suite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}


def test_says_why_not():
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, and this program is for cpu"):
        expert_routes(jnp.zeros((4, 512)), jnp.zeros((1, 2, 512)), 0, k=1, implementation="hopper")


@pytest.mark.parametrize(
    ("experts", "width", "message"),
    [(2, 384, "hidden sizes that are multiples of 512: got 384"), (65, 512, "up to 64 experts: got 65")],
)
def test_says_what_it_takes(monkeypatch, experts, width, message):
    monkeypatch.setattr(_hopper, "missing", lambda: None)
    with pytest.raises(ValueError, match=f"'hopper' cannot run here: it takes {message}"):
        expert_routes(jnp.zeros((4, width)), jnp.zeros((1, experts, width)), 0, k=1, implementation="hopper")
