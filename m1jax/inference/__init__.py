"""One engine for chat, agents and rollouts, and `m1jax.generate` on it."""

from m1jax.inference.engine import Engine
from m1jax.inference.generation import Generation, generate
from m1jax.inference.types import (
    Completion,
    Event,
    Finish,
    Finished,
    Loaded,
    RepetitionStop,
    Request,
    Sampling,
    ThinkingBudget,
    Ticket,
    Wrote,
)

__all__ = [
    "Completion",
    "Engine",
    "Event",
    "Finish",
    "Finished",
    "Generation",
    "Loaded",
    "RepetitionStop",
    "Request",
    "Sampling",
    "ThinkingBudget",
    "Ticket",
    "Wrote",
    "generate",
]
