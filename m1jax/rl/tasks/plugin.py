"""Tasks of others: a function, or a small class.

    def task(rng): n = int(rng.integers(100)); return f"{n}+1=", str(n + 1)

A class may have `draw(rng)` in its place, and `correct(problem, answer)` where more than one text is right; or
`problem(split, seed, index)` and `correct`, a whole `Task`. An attribute `environment` says what it is attempted in.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from m1jax.errors import UserError
from m1jax.rl import plugins
from m1jax.rl.environment import MakeEnvironment, SingleTurn, environment_of
from m1jax.rl.tasks.base import Family, Problem, Split, Task, Unjudged

log = logging.getLogger(__name__)

EXAMPLE = 'def task(rng): n = int(rng.integers(100)); return f"{n}+1=", str(n + 1)'
_TRIES = 16
_STRIDE = 1_000_003  # to a number that no training comes to by itself


class Guarded:
    """A task whose errors cost one sample each: a problem that cannot be made is replaced by another, an answer that
    cannot be judged is left out of its group.

    Args:
        task: somebody else's.
        blame: where an error happened and what it says.
    """

    def __init__(self, task: Task, blame: Callable[[BaseException], str]):
        self.name = task.name
        self.environment = environment_of(task)
        self._task, self._blame = task, blame

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        for number in range(index, index + _TRIES * _STRIDE, _STRIDE):
            try:
                found = self._task.problem(split, seed, number)
            except UserError:
                raise
            except Exception as error:  # it costs this problem alone
                log.warning("%s, at problem %d of %s (seed %d)", self._blame(error), number, split, seed)
                continue
            if not isinstance(found, Problem):
                raise UserError(f"task {self.name}: it made {found!r:.80}, which is no Problem")
            return found
        raise UserError(f"task {self.name}: {_TRIES} problems in a row could not be made; see the warnings before")

    def correct(self, problem: Problem, answer: str) -> bool:
        try:
            return bool(self._task.correct(problem, answer))
        except (UserError, Unjudged):
            raise
        except Exception as error:
            at = f"at {answer!a:.80}, problem {problem.prompt!a:.60}"
            raise Unjudged(f"{self._blame(error)}, {at}") from error


def load_task(place: str) -> Guarded:
    """The task of a name.

    Args:
        place: `FILE.py:name`, or the name of an installed one (entry points `m1jax.tasks`).

    Raises:
        UserError: there is none, or it is no task.
    """
    plugin = plugins.load("task", place, EXAMPLE)
    found = plugin.found
    if not inspect.isclass(found):
        return Guarded(_Drawn(place, found), plugin.blame)
    try:
        task: Any = found()
    except Exception as error:
        raise UserError(plugin.blame(error)) from error
    if callable(getattr(task, "problem", None)) and callable(getattr(task, "correct", None)):
        task.name = place
        return Guarded(task, plugin.blame)
    if not callable(getattr(task, "draw", None)):
        raise UserError(f"task {place!r}: the class has no draw(rng), nor problem and correct; for example: {EXAMPLE}")
    drawn = _Drawn(place, task.draw, getattr(task, "correct", None))
    drawn.environment = environment_of(task)
    return Guarded(drawn, plugin.blame)


class _Drawn(Family):
    """Problems that a function draws."""

    def __init__(
        self, place: str, function: Callable[..., object], correct: Callable[[Problem, str], bool] | None = None
    ):
        self.name, self._function = place, function
        self.environment: MakeEnvironment = SingleTurn
        self._correct = correct

    def draw(self, rng: np.random.Generator) -> Problem:
        made = self._function(rng)
        if isinstance(made, Problem):
            return made
        prompt, answer = made  # pyright: ignore[reportGeneralTypeIssues] (what it is else is an error to be told)
        return Problem(str(prompt), str(answer), family=self.name)

    def correct(self, problem: Problem, answer: str) -> bool:
        return super().correct(problem, answer) if self._correct is None else self._correct(problem, answer)
