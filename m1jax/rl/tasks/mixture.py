"""Several tasks as one."""

import dataclasses
import functools
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import numpy as np

from m1jax.rl.environment import Answer, Environment, MakeEnvironment, Messages, SingleTurn, environment_of
from m1jax.rl.tasks.base import Order, Problem, Split, Task, Turns


class Mixture:
    """Several tasks in turn, in proportion to weights; each in its own environment.

    Args:
        tasks: of different names.
        weights: one for each, above zero; all alike unless given.
    """

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float] | None = None):
        self.name = "+".join(task.name for task in tasks)
        self.parts = [task.name for task in tasks]
        self.weights = list(weights or [1.0] * len(tasks))
        self._tasks = {task.name: task for task in tasks}
        self.turns: Order = Turns(self.weights)
        places = {name: environment_of(task) for name, task in self._tasks.items()}
        self.environment: MakeEnvironment = SingleTurn
        if any(place is not SingleTurn for place in places.values()):
            self.environment = functools.partial(_Routed, places)

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        source, number = self.turns[index]
        task = list(self._tasks.values())[source]
        return dataclasses.replace(task.problem(split, seed, number), source=task.name)

    def by_part(self, problems: Sequence[Problem]) -> list[list[Problem]]:
        """Those of each task."""
        return [[problem for problem in problems if problem.source == name] for name in self.parts]

    def correct(self, problem: Problem, answer: str) -> bool:
        return self._tasks[problem.source].correct(problem, answer)


class _Routed:
    """The environment of whichever task a problem is from."""

    def __init__(self, places: Mapping[str, MakeEnvironment]):
        self._places = places
        self._chosen: Environment = SingleTurn()

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return getattr(self._chosen, "tools", ())

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        self._chosen = self._places[problem.source]()
        return self._chosen.reset(problem, rng)

    def step(self, text: str) -> Answer | Awaitable[Answer]:
        return self._chosen.step(text)
