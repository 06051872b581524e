"""Statistics in plain XLA: the scores of a chunk of tokens at a time, by 16-bit products."""

import jax

from pallas_kernels.ladder import always as unsupported
from pallas_kernels.vocabulary.chunks import Chunks
from pallas_kernels.vocabulary.split import product, split
from pallas_kernels.vocabulary.statistics import Statistics, of_scores

__all__ = ["statistics", "unsupported"]


def statistics(hidden, weight, targets, scale) -> Statistics:
    """Arguments as in `api.vocabulary_statistics`."""
    parts = split(weight)
    chunks = Chunks(len(targets), weight.shape[0])

    def one(chunk):
        hidden, targets = chunk
        return of_scores(product(hidden, parts) * scale, targets)

    return chunks.join(jax.lax.map(one, chunks.split(hidden, targets)))
