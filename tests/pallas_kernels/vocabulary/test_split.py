import jax
import numpy as np
import pytest

from pallas_kernels import target
from pallas_kernels.vocabulary.split import SCALE, split


@pytest.mark.parametrize(("platform", "lost"), [("gpu", 2.0**-22), ("tpu", 2.0**-24)])
def test_parts_add_up(monkeypatch, platform, lost):
    """Under jit, where XLA takes a cast there and back for nothing."""
    monkeypatch.setattr(target, "target_platform", lambda: platform)
    random = np.random.default_rng(0)
    weight = (random.standard_normal(4096) * 10.0 ** random.uniform(-4, 1, 4096)).astype(np.float32)
    parts = jax.jit(lambda x: split(x))(weight)
    total = sum(np.asarray(part, np.float64) for part in parts) / SCALE
    assert np.all(np.abs(total - weight) <= lost * np.abs(weight) + 2.0**-35)
    assert all(part.dtype.itemsize == 2 for part in parts)
