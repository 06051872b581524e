"""The Hopper kernel in Pallas' interpreter, with race detection; test_hopper_compiled.py really compiles it."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _hopper, lightning_attention_decode_ring
from tests.pallas_kernels.lightning.ring.suite import RingSuite


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10.2 interprets no kernel that updates an array in place"
)
class TestHopper(RingSuite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}
    dtypes: ClassVar = ("bfloat16",)
    shapes = ((1, 1, 64, 8), (5, 2, 64, 16), (3, 1, 128, 32))


def test_says_why_it_cannot_run(monkeypatch):
    def run(dtype="bfloat16", room=8):
        q, pool, ring = jnp.zeros((1, 2, 64), dtype), jnp.zeros((1, 2, 64, 64)), jnp.zeros((1, 2, room, 64), dtype)
        zero = np.zeros(1, np.int32)
        lightning_attention_decode_ring(
            q, q, q, jnp.zeros(2), pool, ring, jnp.zeros_like(ring), zero, zero, implementation="hopper"
        )

    with pytest.raises(ValueError, match="'hopper' cannot run here: it needs an NVIDIA Hopper GPU"):
        run()
    monkeypatch.setattr(_hopper, "missing", lambda: None)
    with pytest.raises(ValueError, match=r"takes bfloat16.*float32 to TF32"):
        run("float32")
    for room in (12, 72):
        with pytest.raises(ValueError, match=f"multiple of 8 tokens up to 64: got C = {room}"):
            run(room=room)
