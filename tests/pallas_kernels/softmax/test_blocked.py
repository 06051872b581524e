import functools
from typing import ClassVar

import jax
import pytest

from pallas_kernels import softmax_attention
from pallas_kernels.softmax import blocked
from tests.pallas_kernels.softmax.suite import Case, Suite


class TestBlocked(Suite):
    """In blocks so small that short sequences have several."""

    implementation = "blocked"

    @pytest.fixture(autouse=True)
    def _several_blocks(self, monkeypatch):
        monkeypatch.setattr(blocked, "Q_ROWS", 64)
        monkeypatch.setattr(blocked, "K_BLOCK", 32)


class TestBlocksOfTheUsualSize(Suite):
    implementation = "blocked"
    dtypes: ClassVar = ("float32",)
    test_vmap = test_shard_map = None  # pyright: ignore[reportAssignmentType]

    def pytest_generate_tests(self, metafunc):
        # A shape that no other test has: the op's jit would not notice another size of blocks.
        metafunc.parametrize(
            "case", [Case(length=1100, heads=4, kv_heads=1, size=64, rows=((600, 450, -50),))], ids=str
        )
        metafunc.parametrize("dtype", self.dtypes)


def test_memory_of_128k_tokens():
    """Compiled, not run: 8 query heads on one key/value head of 128, as in M1; scores would take 64 GiB a head."""
    length, gib = 131072, 2**30
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 128), "float32") for heads in (8, 1))

    def gradients(q, k, v, do):
        return jax.vjp(functools.partial(softmax_attention, implementation="blocked"), q, k, v)[1](do)

    memory = jax.jit(gradients).lower(q, k, k, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * gib
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes <= 6 * gib
