"""Causal softmax attention with grouped heads, packed segments and caches; see `api.softmax_attention`."""

from pallas_kernels.softmax.api import softmax_attention

__all__ = ["softmax_attention"]
