"""One's own reward: a function in a Python file."""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from m1jax.errors import UserError
from m1jax.rl.rewards.judge import Unjudged, Verdict
from m1jax.rl.tasks.base import Problem
from m1jax.rl.types import Episode

EXAMPLE = "def reward(prompt, response, answer): return float(answer in response)"


class FunctionJudge:
    """Judges by a function `FILE.py:name`, which takes any of these by their names and returns a number:

    `prompt` and `answer`, the problem's texts; `response`, what the model wrote (`<think>` and all, without its end
    token; of several turns the last); `turns`, all of them; `finished`, whether it came to its end. A reward of one or
    more counts as right where accuracy is shown.

    Raises:
        UserError: there is no such file or function, it cannot be imported, or it takes something else.
    """

    def __init__(self, place: str):
        self._place = place
        file, _, name = place.rpartition(":")
        self._file = Path(file)
        if not name or self._file.suffix != ".py":
            raise UserError(f"reward {place!r}: write FILE.py:function")
        if not self._file.is_file():
            raise UserError(f"reward {place!r}: there is no file {file}")
        module = self._imported()
        found = getattr(module, name, None)
        if not callable(found):
            raise UserError(f"reward {place!r}: {file} has no function {name!r}; for example: {EXAMPLE}")
        self._function: Callable[..., object] = found
        self._wanted = self._parameters()

    def __call__(self, problem: Problem, episode: Episode) -> Verdict:
        given = _arguments(problem, episode)
        try:
            value = self._function(**{name: given[name] for name in self._wanted})
        except Exception as error:  # whatever it is, it costs this response alone
            raise Unjudged(f"{self._where(error)}: {_described(error)}, at {given['response']!a:.80}") from error
        if isinstance(value, int | float) and math.isfinite(value):  # bool too
            return Verdict(float(value), 0.0, value >= 1)
        try:
            number = float(value)  # pyright: ignore[reportArgumentType] (numpy's and jax's scalars)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise Unjudged(f"reward {self._place} returned {value!r:.80}, which is no finite number")
        return Verdict(number, 0.0, number >= 1)

    def _imported(self) -> object:
        name = f"m1jax_reward_{self._file.stem}"
        spec = importlib.util.spec_from_file_location(name, self._file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"reward {self._place!r}: {self._where(error)}: {_described(error)}") from error
        return module

    def _parameters(self) -> list[str]:
        known = inspect.signature(_arguments_by_name).parameters
        parameters = inspect.signature(self._function).parameters.values()
        asked = [p.name for p in parameters if p.default is p.empty or p.name in known]
        if unknown := [name for name in asked if name not in known]:
            raise UserError(
                f"reward {self._place!r}: it takes {', '.join(unknown)}; there are {', '.join(known)}; for example: "
                f"{EXAMPLE}"
            )
        return asked

    def _where(self, error: BaseException) -> str:
        """The file's own line in which it happened."""
        if isinstance(error, SyntaxError):
            return f"{self._file}, line {error.lineno}"
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == self._file]
        return f"{self._file}, line {lines[-1]}" if lines else str(self._file)


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


def _described(error: BaseException) -> str:
    text = str(error).splitlines()
    return type(error).__name__ + (f": {text[0]:.200}" if text else "")
