"""Routes in plain XLA."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.ladder import always as unsupported
from pallas_kernels.norms import xla
from pallas_kernels.norms.api import Norm, Term

__all__ = ["routes", "unsupported"]


def routes(
    terms: Sequence[Term], norm: Norm, gates: jax.Array, layer: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Arguments as in `api.expert_routes`."""
    y = xla.normed(terms, norm, layer, None)
    scores = jnp.einsum("ti,ei->te", y.astype(jnp.float32), gates[layer], precision="highest")
    weights, experts = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), k)
    return y, experts, weights / jnp.sum(weights, axis=-1, keepdims=True)
