"""Running programs that strangers wrote, a language model for one: `run`, and `Pool` for many (docs/sandbox.md)."""

from m1jax.sandbox.limits import Limits, Reason, Result
from m1jax.sandbox.pool import Pool, require, run

__all__ = ["Limits", "Pool", "Reason", "Result", "require", "run"]
