"""TextArena's games for one player as tasks: `textarena:GuessTheNumber-v0` (extra `games`)."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from m1jax.errors import UserError
from m1jax.rl.environment import Messages, Step

if TYPE_CHECKING:  # tasks may bring an environment
    from m1jax.rl.tasks.base import Problem


class TextArena:
    """One game: what stands behind `</think>` is the move, and the reward comes at the end, the game's own."""

    def __init__(self, name: str):
        arena = _package(name)
        if name not in arena.envs.registration.ENV_REGISTRY:
            raise UserError(f"task textarena:{name}: TextArena has no such game")
        self._game = arena.make(name)
        self._told = ""

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        self._game.reset(num_players=1, seed=int(problem.id))
        return self._seen()

    def step(self, text: str) -> Step:
        done, _ = self._game.step(action=text.rpartition("</think>")[2].strip())
        if not done:
            return Step(self._seen(), False)
        rewards, _ = self._game.close()
        return Step([], True, float(rewards[0]))

    def _seen(self) -> Messages:
        """What is new: a game shows all that happened, time and again."""
        _, observation = self._game.get_observation()
        before, self._told = self._told, str(observation)
        return [{"role": "user", "content": self._told.removeprefix(before)}]


def make(name: str) -> functools.partial[TextArena]:
    """What makes the game of a name anew.

    Raises:
        UserError: TextArena is not installed, or has no such game.
    """
    TextArena(name)
    return functools.partial(TextArena, name)


def _package(name: str) -> Any:
    try:
        return importlib.import_module("textarena")
    except ImportError as error:
        raise UserError(f"task textarena:{name}: TextArena is not installed: pip install 'm1jax[games]'") from error
