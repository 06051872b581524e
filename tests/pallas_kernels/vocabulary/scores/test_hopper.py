"""The Hopper kernel in Pallas' interpreter on CPU, with race detection; test_hopper_compiled.py compiles it."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _hopper, vocabulary_scores
from tests.pallas_kernels.vocabulary.scores.suite import CASES, Suite

OLD = jax.__version_info__ < (0, 11)


class TestHopper(Suite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}
    # JAX 0.10.2 interprets no copy beyond an array's end.
    cases: ClassVar = ((64, 128, 256),) if OLD else CASES


def test_says_why_not():
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, and this program is for cpu"):
        vocabulary_scores(jnp.zeros((4, 128), jnp.bfloat16), jnp.zeros((8, 128)), implementation="hopper")


@pytest.mark.parametrize(
    ("words", "width", "dtype", "message"),
    [
        (8, 96, "float32", "hidden sizes that are multiples of 128: got 96"),
        (9, 128, "float32", "numbers of words that are multiples of 8: got 9"),
        (8, 128, "bfloat16", "a float32 weight: got bfloat16"),
    ],
)
def test_says_what_it_takes(monkeypatch, words, width, dtype, message):
    monkeypatch.setattr(_hopper.target, "target_platform", lambda: "gpu")
    monkeypatch.setattr(_hopper.target, "device_kind", lambda: "NVIDIA H200")
    hidden, weight = jnp.zeros((4, width), jnp.bfloat16), jnp.zeros((words, width), dtype)
    with pytest.raises(ValueError, match=f"'hopper' cannot run here: it takes {message}"):
        vocabulary_scores(hidden, weight, implementation="hopper")
