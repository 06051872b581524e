"""MiniMax-M1 in Flax NNX. Read ``transformer.py`` first: block -> run -> period -> model."""

from m1jax.model.cache import Cache
from m1jax.model.transformer import MiniMaxM1, Output

__all__ = ["Cache", "MiniMaxM1", "Output"]
