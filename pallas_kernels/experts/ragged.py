"""Portable version on `jax.lax.ragged_dot`: assignments sorted by expert, three grouped products.

The choice on TPU, where ragged_dot becomes a grouped matmul, and on GPUs other than Hopper, where XLA (JAX 0.11)
multiplies every expert with every token as it does on CPU (docs/kernels-experts.md).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import ladder
from pallas_kernels.experts.routing import plan

unsupported = ladder.always


def forward(
    x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array, routes: jax.Array, weights: jax.Array
) -> jax.Array:
    """Shapes as in `api.expert_mlp`; y [N, D] in x's dtype. Differentiable by JAX itself."""
    rows = plan(routes, w1.shape[0])
    # Rows of no expert here stand behind the last group, and what ragged_dot makes of them differs between platforms.
    real = (rows.token < x.shape[0])[:, None]

    def product(a: jax.Array, matrices: jax.Array) -> jax.Array:
        out = jax.lax.ragged_dot(a, matrices.astype(a.dtype).mT, rows.size, preferred_element_type=jnp.float32)
        return jnp.where(real, out, 0.0)

    sorted_rows = rows.rows(x)
    hidden = jax.nn.silu(product(sorted_rows, w1)) * product(sorted_rows, w3)
    each = rows.gather(product(hidden.astype(x.dtype), w2))
    return jnp.einsum("nk,nkd->nd", weights.astype(jnp.float32), each).astype(x.dtype)
