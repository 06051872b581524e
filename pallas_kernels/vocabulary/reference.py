"""The oracle: all scores written out in float32. For tests; memory grows with N * V."""

import jax
import jax.numpy as jnp

from pallas_kernels.ladder import always as unsupported
from pallas_kernels.vocabulary.statistics import Statistics, of_scores

__all__ = ["statistics", "unsupported"]


def statistics(hidden, weight, targets, scale, keep_scores=False) -> tuple[Statistics, jax.Array | None]:
    """Arguments as in `api.vocabulary_statistics`."""
    scores = jnp.einsum("ti,vi->tv", hidden.astype(jnp.float32), weight.astype(jnp.float32), precision="highest")
    return of_scores(scores * scale, targets), scores * scale if keep_scores else None
