"""Portable version on `jax.lax.ragged_dot`: assignments sorted by expert, three grouped products.

The choice on TPU, where ragged_dot becomes a grouped matmul, and on GPU, where XLA (JAX 0.11) multiplies every expert
with every token as it does on CPU: 14 times the time of the products that count, with two of 16 experts a token on an
H200 (experiments/attention_speed). `grouped.py` is the CPU's.
"""

import jax
import jax.numpy as jnp


def forward(
    x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array, routes: jax.Array, weights: jax.Array
) -> jax.Array:
    """Shapes as in `api.expert_mlp`; y [N, D] in x's dtype. Differentiable by JAX itself."""
    E = w1.shape[0]
    k = routes.shape[1]
    flat = routes.reshape(-1)
    valid = (flat >= 0) & (flat < E)
    # Assignments that belong to no expert here go to the end, behind the last group: ragged_dot leaves them alone.
    expert = jnp.where(valid, flat, E)
    order = jnp.argsort(expert, stable=True)
    token = order // k
    sizes = jnp.bincount(expert, length=E + 1)[:E].astype(jnp.int32)
    real = valid[order][:, None]

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        out = jax.lax.ragged_dot(rows, matrices.astype(rows.dtype).mT, sizes, preferred_element_type=jnp.float32)
        # Rows behind the last group are unspecified on some platforms.
        return jnp.where(real, out, 0.0)

    rows = jnp.where(real, x[token], 0)
    hidden = jax.nn.silu(product(rows, w1)) * product(rows, w3)
    each = product(hidden.astype(x.dtype), w2) * weights.reshape(-1)[order][:, None].astype(jnp.float32)
    return jnp.zeros(x.shape, jnp.float32).at[token].add(each).astype(x.dtype)
