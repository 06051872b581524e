"""Routes in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.ladder import always as unsupported

__all__ = ["routes", "unsupported"]


def routes(x: jax.Array, gates: jax.Array, layer: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Arguments as in `api.expert_routes`."""
    scores = jnp.einsum("ti,ei->te", x.astype(jnp.float32), gates[layer], precision="highest")
    weights, experts = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), k)
    return experts, weights / jnp.sum(weights, axis=-1, keepdims=True)
