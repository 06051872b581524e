"""Softmax over a vocabulary: what log-probabilities and entropies are made of, without writing the scores down."""

from pallas_kernels.vocabulary.api import vocabulary_statistics
from pallas_kernels.vocabulary.statistics import Statistics

__all__ = ["Statistics", "vocabulary_statistics"]
