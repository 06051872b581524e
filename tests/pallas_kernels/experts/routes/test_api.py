import jax.numpy as jnp
import pytest

from pallas_kernels import expert_routes


@pytest.mark.parametrize(
    ("x", "gates", "layer", "k", "message"),
    [
        (jnp.zeros((2, 3, 4)), jnp.zeros((1, 2, 4)), 0, 1, r"x must be \[N, D\] of floats, got \(2, 3, 4\)"),
        (jnp.zeros((2, 4)), jnp.zeros((2, 4)), 0, 1, r"gates must be \[L, E, 4\] float32, got \(2, 4\)"),
        (jnp.zeros((2, 4)), jnp.zeros((1, 2, 4), jnp.bfloat16), 0, 1, "float32, got .* bfloat16"),
        (jnp.zeros((2, 4)), jnp.zeros((1, 2, 4)), 0, 3, "k must be 1 to the number of experts, 2, got 3"),
        (jnp.zeros((2, 4)), jnp.zeros((1, 2, 4)), 1, 1, "layer must be in 0..0, got 1"),
    ],
)
def test_checks_its_arguments(x, gates, layer, k, message):
    with pytest.raises(ValueError, match=message):
        expert_routes(x, gates, layer, k=k)
