from typing import ClassVar

import jax
import pytest

from pallas_kernels import softmax_attention_decode
from pallas_kernels.softmax.decode import xla
from tests.pallas_kernels.softmax.decode.suite import DecodeSuite


class TestXla(DecodeSuite):
    """In blocks so small that short sequences have several, some of them across pages."""

    implementation = "xla"

    @pytest.fixture(autouse=True)
    def _several_blocks(self, monkeypatch):
        monkeypatch.setattr(xla, "KEYS", 24)


class TestBlocksOfTheUsualSize(DecodeSuite):
    implementation = "xla"
    dtypes: ClassVar = ("float32",)
    test_a_layer_of_a_stack = test_shard_map = None  # pyright: ignore[reportAssignmentType]

    def bears(self, case):
        return max(case.lengths) == 1000


def test_memory_does_not_grow_with_the_length():
    """Compiled, not run: four rows of 131,072 tokens of M1's eight heads."""
    q = jax.ShapeDtypeStruct((4, 64, 128), "float32")
    pool = jax.ShapeDtypeStruct((4 * 512, 256, 8, 128), "float32")
    pages, lengths = jax.ShapeDtypeStruct((4, 512), "int32"), jax.ShapeDtypeStruct((4,), "int32")
    compiled = jax.jit(softmax_attention_decode).lower(q, pool, pool, pages, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 128 << 20
