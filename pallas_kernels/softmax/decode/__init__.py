"""One token for each of many sequences, whose keys and values lie in pages; see `api.softmax_attention_decode`."""

from pallas_kernels.softmax.decode.api import softmax_attention_decode

__all__ = ["softmax_attention_decode"]
