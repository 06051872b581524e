"""Decoding that leaves states where they are for some tokens; see `api.lightning_attention_decode_ring`."""

from pallas_kernels.lightning.ring.api import lightning_attention_decode_ring

__all__ = ["lightning_attention_decode_ring"]
