"""Lightning attention: linear attention with one constant decay per head."""

from pallas_kernels.lightning.api import lightning_attention, lightning_attention_decode
from pallas_kernels.lightning.ring import lightning_attention_decode_ring
from pallas_kernels.lightning.segments import PADDING
from pallas_kernels.lightning.sequence_parallel import lightning_attention_sequence_parallel

__all__ = [
    "PADDING",
    "lightning_attention",
    "lightning_attention_decode",
    "lightning_attention_decode_ring",
    "lightning_attention_sequence_parallel",
]
