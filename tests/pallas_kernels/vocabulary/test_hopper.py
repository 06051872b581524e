"""The Hopper kernel in Pallas' interpreter on CPU, with race detection; test_hopper_compiled.py compiles it."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _hopper, vocabulary_statistics
from pallas_kernels.vocabulary import hopper
from tests.pallas_kernels.vocabulary.suite import CASES, Case, Suite

OLD = jax.__version_info__ < (0, 11)


class TestHopper(Suite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}
    platform = "gpu"

    def cases(self):
        # JAX 0.10.2 interprets no copy beyond an array's end.
        return (Case(tokens=128, words=256, width=256),) if OLD else CASES

    # The interpreter runs on one device at a time; test_hopper_compiled.py compiles a shard_map.
    test_words_over_devices = None  # pyright: ignore[reportAssignmentType]


def test_says_why_not():
    hidden, weight, targets = jnp.zeros((4, 192), jnp.bfloat16), jnp.zeros((8, 192)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, and this program is for cpu"):
        vocabulary_statistics(hidden, weight, targets, implementation="hopper")


def test_says_which_sizes(monkeypatch):
    monkeypatch.setattr(_hopper.target, "target_platform", lambda: "gpu")
    monkeypatch.setattr(_hopper.target, "device_kind", lambda: "NVIDIA H200")
    hidden, weight, targets = jnp.zeros((4, 192), jnp.bfloat16), jnp.zeros((8, 192)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=f"multiples of {hopper.GROUP}: got 192"):
        vocabulary_statistics(hidden, weight, targets, implementation="hopper")
