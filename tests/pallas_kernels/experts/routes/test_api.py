import jax.numpy as jnp
import pytest

from pallas_kernels import Norm, expert_routes

X, NORM = [(jnp.zeros((2, 4)), 1.0)], Norm(jnp.ones((1, 4)), 1e-5)


@pytest.mark.parametrize(
    ("terms", "norm", "gates", "layer", "k", "message"),
    [
        ([(jnp.zeros((2, 3, 4)), 1.0)], NORM, jnp.zeros((1, 2, 4)), 0, 1, r"must all be \[N, D\] of one dtype"),
        (X, NORM, jnp.zeros((2, 4)), 0, 1, r"gates must be \[L, E, 4\] float32, got \(2, 4\)"),
        (X, NORM, jnp.zeros((1, 2, 4), jnp.bfloat16), 0, 1, "float32, got .* bfloat16"),
        (X, NORM, jnp.zeros((1, 2, 4)), 0, 3, "k must be 1 to the number of experts, 2, got 3"),
        (X, NORM, jnp.zeros((1, 2, 4)), 1, 1, "layer must be in 0..0, got 1"),
        (X, NORM, jnp.zeros((2, 2, 4)), 0, 1, "must have as many layers, got 2, 1"),
    ],
)
def test_checks_its_arguments(terms, norm, gates, layer, k, message):
    with pytest.raises(ValueError, match=message):
        expert_routes(terms, norm, gates, layer, k=k)
