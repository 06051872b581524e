"""Sampling and generation."""

from m1jax.inference.generate import Generation, Samples, decode, generate, pad_prompts
from m1jax.inference.sampling import sample

__all__ = ["Generation", "Samples", "decode", "generate", "pad_prompts", "sample"]
