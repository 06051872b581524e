import jax.numpy as jnp
import pytest

from pallas_kernels import Projection, project

X = jnp.zeros((2, 4))


@pytest.mark.parametrize(
    ("x", "projection", "layer", "message"),
    [
        (X[0], Projection(jnp.zeros((1, 6, 4))), 0, r"x must be \[N, D\], got \(4,\)"),
        (X, Projection(jnp.zeros((6, 4))), 0, r"weights must be \[L, R, 4\] float32, got \(6, 4\)"),
        (X, Projection(jnp.zeros((1, 6, 4), jnp.bfloat16)), 0, "float32, got .* bfloat16"),
        (X, Projection(jnp.zeros((1, 6, 4))), 1, "layer must be in 0..0, got 1"),
        (X, Projection(jnp.zeros((1, 6, 4)), "silu", 3), 0, "6 channels cannot be dealt out to 3 by None"),
        (X, Projection(jnp.zeros((1, 6, 4)), "silu", 3, 4), 0, "6 channels cannot be dealt out to 3 by 4"),
    ],
)
def test_checks_its_arguments(x, projection, layer, message):
    with pytest.raises(ValueError, match=message):
        project(x, [projection], layer)
