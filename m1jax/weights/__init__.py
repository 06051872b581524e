"""A model's weights as Hugging Face files: one bijective table of names, readers and writers of safetensors."""

from m1jax.weights.directory import locate

__all__ = ["locate"]
