"""Statistics in plain XLA: the scores of a chunk of tokens at a time, by 16-bit products."""

import jax

from pallas_kernels.ladder import always as unsupported
from pallas_kernels.vocabulary.chunks import Chunks
from pallas_kernels.vocabulary.split import product, split
from pallas_kernels.vocabulary.statistics import Statistics, of_scores

__all__ = ["statistics", "unsupported"]


def statistics(hidden, weight, targets, scale, keep_scores=False) -> tuple[Statistics, jax.Array | None]:
    """Arguments as in `api.vocabulary_statistics`."""
    parts = split(weight)
    chunks = Chunks(len(targets), weight.shape[0])

    def one(chunk):
        hidden, targets = chunk
        scores = product(hidden, parts) * scale
        return of_scores(scores, targets), scores if keep_scores else None

    return chunks.join(jax.lax.map(one, chunks.split(hidden, targets)))
