"""One's own reward: a function, or a class whose instances are functions."""

import inspect
import math
from collections.abc import Callable

from m1jax.errors import UserError
from m1jax.rl import plugins
from m1jax.rl.rewards.judge import Unjudged, Verdict
from m1jax.rl.tasks.base import Problem
from m1jax.rl.types import Episode

EXAMPLE = "def reward(prompt, response, answer): return float(answer in response)"


class FunctionJudge:
    """Judges by a function, which takes any of these by their names and returns a number:

    `prompt` and `answer`, the problem's texts; `response`, what the model wrote (`<think>` and all, without its end
    token; of several turns the last); `turns`, all of them; `finished`, whether it came to its end. A reward of one or
    more counts as right where accuracy is shown. A class is made once, without arguments.

    Args:
        place: `FILE.py:name`, or the name of an installed one (entry points `m1jax.rewards`).

    Raises:
        UserError: there is no such file or function, it cannot be imported, or it takes something else.
    """

    def __init__(self, place: str):
        self._plugin = plugins.load("reward", place, EXAMPLE)
        found = self._plugin.found
        if inspect.isclass(found):
            try:
                found = found()
            except Exception as error:
                raise UserError(self._plugin.blame(error)) from error
            if not callable(found):
                raise UserError(f"reward {place!r}: the class has no __call__; for example: {EXAMPLE}")
        self._function: Callable[..., object] = found
        self._wanted = self._parameters()

    def __call__(self, problem: Problem, episode: Episode) -> Verdict:
        given = _arguments(problem, episode)
        try:
            value = self._function(**{name: given[name] for name in self._wanted})
        except Exception as error:  # whatever it is, it costs this response alone
            at = f"at {given['response']!a:.80}, problem {problem.prompt!a:.60}"
            raise Unjudged(f"{self._plugin.blame(error)}, {at}") from error
        if isinstance(value, int | float) and math.isfinite(value):  # bool too
            return Verdict(float(value), 0.0, value >= 1)
        try:
            number = float(value)  # pyright: ignore[reportArgumentType] (numpy's and jax's scalars)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise Unjudged(
                f"reward {self._plugin.place} returned {value!r:.80}, which is no finite number, at problem "
                f"{problem.prompt!a:.60}"
            )
        return Verdict(number, 0.0, number >= 1)

    def _parameters(self) -> list[str]:
        known = inspect.signature(_arguments_by_name).parameters
        parameters = inspect.signature(self._function).parameters.values()
        asked = [p.name for p in parameters if p.default is p.empty or p.name in known]
        if unknown := [name for name in asked if name not in known]:
            raise UserError(
                f"reward {self._plugin.place!r}: it takes {', '.join(unknown)}; there are {', '.join(known)}; for "
                f"example: {EXAMPLE}"
            )
        return asked


def _arguments_by_name(prompt: str, response: str, answer: str, turns: tuple[str, ...], finished: bool) -> None:
    """What a reward function may take."""


def _arguments(problem: Problem, episode: Episode) -> dict[str, object]:
    return {
        "prompt": problem.prompt,
        "response": episode.turns[-1],
        "answer": problem.answer,
        "turns": episode.turns,
        "finished": episode.finish == "stop",
    }
