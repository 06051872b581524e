"""The Hopper kernel in Pallas' interpreter, with race detection; test_hopper_compiled.py really compiles it."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _hopper, softmax_attention_decode
from pallas_kernels.softmax.decode import hopper
from tests.pallas_kernels.softmax.decode.suite import CASES, DecodeSuite, problem


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10.2 interprets no transposed operands")
class TestHopper(DecodeSuite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}
    dtypes: ClassVar = ("bfloat16",)
    # The interpreter runs on one device at a time; test_hopper_compiled.py compiles a shard_map.
    test_shard_map = None  # pyright: ignore[reportAssignmentType]

    def bears(self, case):
        return self.takes(case) and case.heads < 8

    def takes(self, case):
        return case.page_size % 64 == 0 and max(case.lengths) < 1000


@pytest.mark.slow
class TestHopperLonger(TestHopper):
    def bears(self, case):
        return self.takes(case) and not super().bears(case)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10.2 interprets no transposed operands")
def test_races_are_found(monkeypatch):
    """Else the tests above would show little: without the fences, products race with what other threads write."""
    (q, keys, values, *where), _ = problem(CASES[2])
    monkeypatch.setattr(hopper.plgpu, "commit_smem", lambda: None)
    low = (jnp.asarray(x, jnp.bfloat16) for x in (q, keys, values))
    with pytest.raises(Exception, match=r"(?i)race"):
        jax.block_until_ready(hopper.decode(*low, *map(jnp.asarray, where), interpret=True))


def test_says_why_it_cannot_run(monkeypatch):
    def run(dtype="bfloat16", size=64, page_size=64, heads=2):
        pool = jnp.zeros((3, page_size, 1, size), dtype)
        q, pages = jnp.zeros((2, heads, size), dtype), jnp.zeros((2, 1), jnp.int32)
        softmax_attention_decode(q, pool, pool, pages, jnp.ones(2, jnp.int32), implementation="hopper")

    with pytest.raises(ValueError, match="'hopper' cannot run here: it needs an NVIDIA Hopper GPU"):
        run()
    monkeypatch.setattr(_hopper, "missing", lambda: None)
    for changes, message in [
        ({"dtype": "float32"}, r"takes bfloat16.*float32 to TF32"),
        ({"size": 32}, "size 64 or 128: got D = 32"),
        ({"page_size": 96}, "pages of a multiple of 64 tokens: got 96"),
        ({"heads": 65}, "at most 64 query heads to a key/value head: got 65 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(**changes)
