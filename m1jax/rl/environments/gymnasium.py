"""Gymnasium's environments as tasks: `gymnasium:FrozenLake-v1` (extra `games`). Actions are numbers."""

from __future__ import annotations

import functools
import importlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from m1jax.errors import UserError
from m1jax.rl.environment import Messages, Step

if TYPE_CHECKING:  # tasks may bring an environment
    from m1jax.rl.tasks.base import Problem


class Gymnasium:
    """One environment of discrete actions; what it shows is its `ansi` rendering, or else its observation.

    The action of a turn is the last whole number behind its `</think>`; without one that exists, the policy is told so,
    and nothing happens. The reward is the game's own.
    """

    def __init__(self, name: str):
        gymnasium = _package(name)
        try:
            self._game = gymnasium.make(name)
            if "ansi" in self._game.metadata["render_modes"]:
                self._game = gymnasium.make(name, render_mode="ansi")
        except gymnasium.error.Error as error:
            raise UserError(f"task gymnasium:{name}: {error}") from error
        if not isinstance(self._game.action_space, gymnasium.spaces.Discrete):
            raise UserError(f"task gymnasium:{name}: its actions are {self._game.action_space}; expected Discrete ones")
        first, count = int(self._game.action_space.start), int(self._game.action_space.n)
        self._actions = range(first, first + count)

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        shown, _ = self._game.reset(seed=int(problem.id))
        return self._said(f"Actions: {self._actions[0]} to {self._actions[-1]}\n{self._seen(shown)}")

    def step(self, text: str) -> Step:
        numbers = re.findall(r"-?\d{1,9}", text.rpartition("</think>")[2])
        action = int(numbers[-1]) if numbers else None
        if action not in self._actions:
            return Step(self._said(f"an action is a number from {self._actions[0]} to {self._actions[-1]}"), False)
        shown, reward, terminated, truncated, _ = self._game.step(action)
        done = bool(terminated or truncated)
        return Step([] if done else self._said(self._seen(shown)), done, float(reward))

    def _seen(self, observation: object) -> str:
        if self._game.render_mode != "ansi":
            return str(observation)
        # What stands out by its colour stands in brackets.
        return re.sub(r"\x1b\[\d+m(.*?)\x1b\[0m", r"[\1]", self._game.render())

    def _said(self, text: str) -> Messages:
        return [{"role": "user", "content": text}]


def make(name: str) -> functools.partial[Gymnasium]:
    """What makes the environment of a name anew.

    Raises:
        UserError: Gymnasium is not installed, has no such environment, or one whose actions are not discrete.
    """
    Gymnasium(name)
    return functools.partial(Gymnasium, name)


def _package(name: str) -> Any:
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        raise UserError(f"task gymnasium:{name}: Gymnasium is not installed: pip install 'm1jax[games]'") from error
