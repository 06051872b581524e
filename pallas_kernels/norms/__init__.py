"""Norms of the few tokens of a decode step; see `api.normed`."""

from pallas_kernels.norms.api import Norm, Term, normed

__all__ = ["Norm", "Term", "normed"]
