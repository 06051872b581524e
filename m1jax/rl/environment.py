"""What the policy acts in: it speaks, and is answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # tasks may bring an environment
    from m1jax.rl.tasks.base import Problem, Task

Messages = Sequence[Mapping[str, Any]]
"""as `m1jax.chat.render` takes them"""


class Step(NamedTuple):
    """What an environment makes of a turn of the policy; a plain tuple of the first two does as well."""

    messages: Messages
    """the answer; nothing is said after the last turn"""
    done: bool
    reward: float | None = None
    """of this turn, where the environment itself rewards; an episode's is the sum"""


Answer = Step | tuple[Messages, bool]


class Environment(Protocol):
    """One attempt at one problem; made for it, and used once.

    An environment whose model may call tools has their schemas in an attribute `tools`, for the prompt. What either
    method raises costs the attempt alone: it is left out of its group.
    """

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        """What is said first. All chance comes from `rng`."""
        ...

    def step(self, text: str) -> Answer | Awaitable[Answer]:
        """What is answered to a turn of the policy.

        A coroutine is waited for while the other attempts go on: for what takes its time. It depends on the clock then
        which attempts share a step of the engine, so that two runs may differ by rounding.
        """
        ...


MakeEnvironment = Callable[[], Environment]


class SingleTurn:
    """A question and an answer: what most tasks of `m1jax.rl.tasks` are."""

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        return [{"role": "user", "content": problem.prompt}]

    def step(self, text: str) -> Step:
        return Step([], True)


def environment_of(task: Task) -> MakeEnvironment:
    """What a task is attempted in."""
    return getattr(task, "environment", SingleTurn)
