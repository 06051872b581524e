"""The operations that decide M1's speed, each behind one function that picks the best form for the platform.

Imports JAX alone and knows nothing of M1: it takes mathematics (log decays, states), not model facts.
"""

from pallas_kernels.experts import exchanges_tokens, expert_mlp, expert_routes
from pallas_kernels.lightning import (
    PADDING,
    lightning_attention,
    lightning_attention_decode,
    lightning_attention_decode_ring,
)
from pallas_kernels.projections import Projection, project
from pallas_kernels.softmax import softmax_attention, softmax_attention_decode
from pallas_kernels.target import target_platform
from pallas_kernels.vocabulary import vocabulary_scores, vocabulary_statistics

__all__ = [
    "PADDING",
    "Projection",
    "exchanges_tokens",
    "expert_mlp",
    "expert_routes",
    "lightning_attention",
    "lightning_attention_decode",
    "lightning_attention_decode_ring",
    "project",
    "softmax_attention",
    "softmax_attention_decode",
    "target_platform",
    "vocabulary_scores",
    "vocabulary_statistics",
]
