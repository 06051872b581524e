"""The oracle: every expert for every token, in float32, weighted by what the routes say. For tests."""

import jax
import jax.numpy as jnp

from pallas_kernels import ladder

unsupported = ladder.always


def forward(
    x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array, routes: jax.Array, weights: jax.Array
) -> jax.Array:
    """Shapes as in `api.expert_mlp`; y [N, D] in x's dtype. Differentiable by JAX itself."""
    dtype = x.dtype
    x, w1, w3, w2, weights = (a.astype(jnp.float32) for a in (x, w1, w3, w2, weights))
    # [N, E]: the sum of a token's weights for an expert; ids outside 0..E-1 match no column.
    chosen = (routes[:, :, None] == jnp.arange(w1.shape[0])).astype(jnp.float32)
    share = jnp.einsum("nk,nke->ne", weights, chosen, precision="highest")
    up = jnp.einsum("nd,efd->enf", x, w1, precision="highest")
    gate = jnp.einsum("nd,efd->enf", x, w3, precision="highest")
    each = jnp.einsum("enf,edf->end", jax.nn.silu(up) * gate, w2, precision="highest")
    return jnp.einsum("ne,end->nd", share, each, precision="highest").astype(dtype)
