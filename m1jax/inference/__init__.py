"""One engine for chat, agents and rollouts, and `m1jax.generate` on it."""

from m1jax.inference.engine import Engine
from m1jax.inference.generation import Generation, generate
from m1jax.inference.types import (
    Completion,
    Constraint,
    Event,
    Finish,
    Finished,
    Loaded,
    Matcher,
    RepetitionStop,
    Request,
    Sampling,
    ThinkingBudget,
    Ticket,
    Wrote,
)

__all__ = [
    "Completion",
    "Constraint",
    "Engine",
    "Event",
    "Finish",
    "Finished",
    "Generation",
    "Loaded",
    "Matcher",
    "RepetitionStop",
    "Request",
    "Sampling",
    "ThinkingBudget",
    "Ticket",
    "Wrote",
    "generate",
]
