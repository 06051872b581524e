"""MiniMax-M1 in Flax NNX. Read ``transformer.py`` first: block -> period of layers -> model."""

from m1jax.model.cache import Cache
from m1jax.model.transformer import HiddenStates, MiniMaxM1

__all__ = ["Cache", "HiddenStates", "MiniMaxM1"]
