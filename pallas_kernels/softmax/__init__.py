"""Causal softmax attention with grouped heads: of whole rows, packed segments and caches; of one token over pages."""

from pallas_kernels.softmax.api import softmax_attention
from pallas_kernels.softmax.decode import softmax_attention_decode

__all__ = ["softmax_attention", "softmax_attention_decode"]
