"""When a completion ends, and when its thought must: the same rules on the device and beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m1jax.inference.types import Finish, ThinkingBudget

END_IDS = 8
"""End ids that a request may have: the device compares with so many."""
NEVER = 2**31 - 1
"""Tokens in a row that no repetition reaches."""

REASONS: tuple[Finish | None, ...] = (None, "stop", "repetition", "fault")
"""What `ended` returns numbers of."""


class Stops(NamedTuple):
    """What ends each row, and how close it is to it."""

    end_ids: Int[Array, "rows END_IDS"]
    """filled up with -1"""
    certain: Float[Array, " rows"]
    """log-probability above which a token counts as repetition"""
    patience: Int[Array, " rows"]
    """such tokens in a row that end a completion"""
    run: Int[Array, " rows"]
    """such tokens in a row so far"""


def ended(
    stops: Stops, tokens: Int[Array, " rows"], logp: Float[Array, " rows"], alive: Bool[Array, " rows"]
) -> tuple[Stops, Int[Array, " rows"]]:
    """Takes the rows' new tokens into account: the new `Stops` and, per row, the place of its reason in `REASONS`."""
    run = jnp.where(alive, jnp.where(logp > stops.certain, stops.run + 1, 0), stops.run)
    reason = jnp.where(jnp.any(tokens[:, None] == stops.end_ids, axis=1), 1, jnp.where(run >= stops.patience, 2, 0))
    reason = jnp.where(jnp.isnan(logp), 3, reason)
    return stops._replace(run=run), jnp.where(alive, reason, 0)


class Thought:
    """Follows one completion's thought: not begun, open, or closed for good.

    Args:
        budget: how long it may be.
        prompt: the prompt's ids; it may end with the opening.
    """

    def __init__(self, budget: ThinkingBudget, prompt: Sequence[int]) -> None:
        self._budget = budget
        self._tail: list[int] = list(prompt[len(prompt) - len(budget.open) :])
        self._spent: int | None = None
        self._closed = False
        self._look()

    def _look(self) -> None:
        """Whether the last ids begin the thought, or end it."""
        opening, closing = list(self._budget.open), list(self._budget.close)
        if self._spent is None and self._tail[len(self._tail) - len(opening) :] == opening:
            self._spent, self._tail = 0, []
        elif self._spent is not None and self._tail[-len(closing) :] == closing:
            self._closed = True

    def feed(self, tokens: Sequence[int]) -> None:
        """More tokens of the completion, forced ones too."""
        for token in tokens:
            if self._closed:
                return
            self._tail = [*self._tail[-max(len(self._budget.open), len(self._budget.close)) :], token]
            if self._spent is not None:
                self._spent += 1
            self._look()

    @property
    def left(self) -> int | None:
        """Tokens that may be drawn before the thought must be looked at again; 0: close it now; None: it is closed."""
        if self._closed:
            return None
        return max(0, self._budget.tokens - (self._spent or 0))
