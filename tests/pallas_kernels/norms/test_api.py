import jax.numpy as jnp
import pytest

from pallas_kernels import Norm, normed

X, NORM = jnp.zeros((2, 4)), Norm(jnp.ones((1, 4)), 1e-5)


@pytest.mark.parametrize(
    ("terms", "norm", "layer", "gate", "message"),
    [
        ([(X, 1.0), (X[:1], 1.0)], NORM, 0, None, r"of one dtype, got \(2, 4\) float32, \(1, 4\) float32"),
        ([(X, 1.0)], Norm(jnp.ones(4), 1e-5), 0, None, r"the norm's weights must be \[L, 4\], got \(4,\)"),
        ([(X, 1.0)], NORM, 1, None, "layer must be in 0..0, got 1"),
        ([(X, 1.0)], NORM, 0, X[:, :2], r"gate must be \(2, 4\) float32, got \(2, 2\) float32"),
    ],
)
def test_checks_its_arguments(terms, norm, layer, gate, message):
    with pytest.raises(ValueError, match=message):
        normed(terms, norm, layer, gate=gate)
