"""The operations that decide M1's speed, each behind one function that picks the best form for the platform.

Imports JAX alone and knows nothing of M1: it takes mathematics (log decays, states), not model facts.
"""

from pallas_kernels.lightning_attention import PADDING, lightning_attention, lightning_attention_decode

__all__ = ["PADDING", "lightning_attention", "lightning_attention_decode"]
