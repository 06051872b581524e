"""The kernel is tested with all sizes of its blocks."""

import pytest

from pallas_kernels.experts import grouped


@pytest.fixture(autouse=True)
def _all_blocks(blocks_of_experts, monkeypatch):
    monkeypatch.setattr(grouped, "BLOCKS", blocks_of_experts)
