"""MiniMax-M1 in JAX: the model, its kernels, its reinforcement learning (arXiv 2506.13585)."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m1jax import sharding as sharding
    from m1jax.agent import Agent
    from m1jax.config import ModelConfig
    from m1jax.errors import UserError
    from m1jax.inference import generate
    from m1jax.model import Cache, MiniMaxM1
    from m1jax.weights.pretrained import from_pretrained, save_pretrained

__all__ = ["Agent", "Cache", "MiniMaxM1", "ModelConfig", "UserError", "from_pretrained", "generate", "save_pretrained"]

# Where the public names are. They are imported when they are first asked for: `m1jax --help` need not wait for JAX.
_HOMES = {
    "Agent": "m1jax.agent",
    "Cache": "m1jax.model",
    "MiniMaxM1": "m1jax.model",
    "ModelConfig": "m1jax.config",
    "UserError": "m1jax.errors",
    "from_pretrained": "m1jax.weights.pretrained",
    "generate": "m1jax.inference",
    "save_pretrained": "m1jax.weights.pretrained",
}

if not TYPE_CHECKING:  # else a misspelt name would have a type

    def __getattr__(name):
        if name == "sharding":
            return importlib.import_module("m1jax.sharding")
        if name not in _HOMES:
            raise AttributeError(f"module 'm1jax' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__, "sharding"})
