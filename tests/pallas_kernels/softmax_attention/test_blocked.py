from typing import ClassVar

import pytest

from pallas_kernels.softmax_attention import blocked
from tests.pallas_kernels.softmax_attention.suite import Case, Suite


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
