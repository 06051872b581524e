"""The TPU kernels in Pallas' interpreter on CPU, with race detection; test_tpu_compiled.py compiles them for real."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import lightning_attention
from pallas_kernels.lightning import tpu
from tests.pallas_kernels.lightning.suite import DecodeSuite, Suite

INTERPRET = pltpu.InterpretParams(detect_races=True)


class Interpreted:
    @pytest.fixture(autouse=True)
    def _no_races(self):
        yield
        assert interpreter.races is None or not interpreter.races.races_found


class TestTpu(Interpreted, Suite):
    implementation = "tpu"
    options: ClassVar = {"interpret": INTERPRET}

    def bears(self, case):
        """What the interpreter does in a second or two."""
        return self.takes(case) and case.length <= 256 and case.heads <= 6

    def takes(self, case):
        return case.value_size in (None, case.key_size) and case.length <= 1024


@pytest.mark.slow
class TestTpuLonger(TestTpu):
    def bears(self, case):
        return self.takes(case) and not super().bears(case)


class TestTpuDecode(Interpreted, DecodeSuite):
    implementation = "tpu"
    module = "tpu"
    options: ClassVar = {"interpret": INTERPRET}
    shapes = ((1, 1, 64), (4, 6, 64), (5, 16, 128))


@pytest.mark.parametrize("slots", [(-1, -1, 2, -3, 0), (-1, -1, -1, -1, -1), (2, 1, -1, -1, -1)])
def test_idle_sequences_touch_nothing(slots):
    """In front, at the end, or all of them: where the pipeline's blocks belong to nobody."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (5, 2, 64)) for key in keys[:3])
    pool = jax.random.normal(keys[3], (3, 2, 64, 64))
    o, new = tpu.decode(q, k, v, jnp.array([-0.1, -0.2]), pool, jnp.array(slots, jnp.int32), interpret=INTERPRET)
    for row in range(3):
        assert (new[row] == pool[row]).all() == (row not in slots)
    for n, slot in enumerate(slots):
        assert o[n].any() == (slot >= 0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_nothing_beyond_the_array_counts(garbage):
    """T = 200 in a block of 256 tokens, three heads of 64 in two tiles of two: what lies beyond may be anything."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 200, 3, 64)) for key in keys)
    log_decay = jnp.array([-0.1, -0.01, 0.0])
    fill = pltpu.InterpretParams(uninitialized_memory="nan" if garbage != garbage else "zero")
    o, state = tpu.forward(q, k, v, log_decay, None, None, interpret=fill)
    assert jnp.isfinite(o).all()
    assert jnp.isfinite(state).all()


def test_says_why_not():
    q = jnp.zeros((1, 8, 2, 64))
    with pytest.raises(ValueError, match="needs a TPU, and this program is for cpu"):
        lightning_attention(q, q, q, jnp.zeros(2), implementation="tpu")


def test_says_which_sizes(monkeypatch):
    monkeypatch.setattr(tpu.target, "target_platform", lambda: "tpu")
    q, v = jnp.zeros((1, 8, 2, 64)), jnp.zeros((1, 8, 2, 128))
    with pytest.raises(ValueError, match=r"size 64 or 128.*got K = 64, V = 128"):
        lightning_attention(q, q, v, jnp.zeros(2), implementation="tpu")
