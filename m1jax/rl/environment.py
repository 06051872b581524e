"""What the policy acts in: it speaks, and is answered."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from m1jax.rl.tasks.base import Problem

Messages = Sequence[Mapping[str, str]]
"""as `m1jax.chat.render` takes them"""


class Environment(Protocol):
    """One attempt at one problem; made for it, and used once."""

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        """What is said first. All chance comes from `rng`."""
        ...

    def step(self, text: str) -> tuple[Messages, bool]:
        """What is answered to a turn of the policy, and whether that was the last one (then nothing is)."""
        ...


MakeEnvironment = Callable[[], Environment]


class SingleTurn:
    """A question and an answer: what every task of `m1jax.rl.tasks` is."""

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        return [{"role": "user", "content": problem.prompt}]

    def step(self, text: str) -> tuple[Messages, bool]:
        return [], True
