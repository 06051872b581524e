"""The arithmetic of matrix units, which a CPU can do too."""

import pytest

from pallas_kernels.vocabulary import chunks
from tests.pallas_kernels.vocabulary.suite import Suite


class TestFloat16(Suite):
    """As on a GPU."""

    implementation = "xla"
    platform = "gpu"


class TestBfloat16(Suite):
    """As on a TPU, in several chunks."""

    implementation = "xla"
    platform = "tpu"

    @pytest.fixture(autouse=True)
    def _several_chunks(self, monkeypatch):
        monkeypatch.setattr(chunks, "ELEMENTS", 5000)
