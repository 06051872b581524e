"""The scores themselves, for the few tokens of a decode step."""

from pallas_kernels.vocabulary.scores.api import vocabulary_scores

__all__ = ["vocabulary_scores"]
