"""MiniMax-M1 in JAX: the model, its kernels, its reinforcement learning (arXiv 2506.13585)."""

from m1jax.agent import Agent
from m1jax.config import ModelConfig
from m1jax.convert.pretrained import from_pretrained, save_pretrained
from m1jax.errors import UserError
from m1jax.inference import generate
from m1jax.model import Cache, MiniMaxM1

__all__ = ["Agent", "Cache", "MiniMaxM1", "ModelConfig", "UserError", "from_pretrained", "generate", "save_pretrained"]
