"""Lightning attention: linear attention with one constant decay per head."""

from pallas_kernels.lightning_attention.api import (
    DECODE_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    lightning_attention,
    lightning_attention_decode,
)
from pallas_kernels.lightning_attention.segments import PADDING
from pallas_kernels.lightning_attention.sequence_parallel import lightning_attention_sequence_parallel

__all__ = [
    "DECODE_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "PADDING",
    "lightning_attention",
    "lightning_attention_decode",
    "lightning_attention_sequence_parallel",
]
