"""Hidden states times a vocabulary, as accurate as float32 on matrix units: scores, and what softmax takes of them."""

from pallas_kernels.vocabulary.api import vocabulary_statistics
from pallas_kernels.vocabulary.scores import vocabulary_scores
from pallas_kernels.vocabulary.statistics import Statistics

__all__ = ["Statistics", "vocabulary_scores", "vocabulary_statistics"]
