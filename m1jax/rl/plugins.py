"""Tasks, rewards and environments of others by name: what an installed package offers, or `FILE.py:name`.

A package offers them as entry points of the groups `m1jax.tasks`, `m1jax.rewards` and `m1jax.environments`.
"""

import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from m1jax.errors import UserError

Kind = Literal["task", "reward", "environment"]


class Plugin(NamedTuple):
    """What was found under a name."""

    kind: Kind
    place: str
    """as it was asked for"""
    found: Any
    """a function or class"""
    file: Path | None
    """where it is defined; None where an installed package offers it"""

    def blame(self, error: BaseException) -> str:
        """Where an error happened and what it says, in one line."""
        where = _where(error, self.file)
        return f"{self.kind} {self.place}: {where}{': ' if where else ''}{described(error)}"


def installed(kind: Kind) -> list[str]:
    """The names that installed packages offer."""
    return sorted({entry.name for entry in importlib.metadata.entry_points(group=f"m1jax.{kind}s")})


def is_plugin(kind: Kind, place: str) -> bool:
    """Whether a name means a plug-in: a file, or what a package offers."""
    return ".py" in place or place in installed(kind)


def load(kind: Kind, place: str, example: str) -> Plugin:
    """The plug-in of a name.

    Args:
        kind: what it is to be.
        place: `FILE.py:name`, or the name of an entry point.
        example: a right one, for messages.

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    file, _, name = place.rpartition(":")
    if place in installed(kind):
        (entry, *_) = importlib.metadata.entry_points(group=f"m1jax.{kind}s", name=place)
        try:
            return Plugin(kind, place, _callable(kind, place, entry.load(), entry.value, example), None)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{kind} {place!r} ({entry.value}): {described(error)}") from error
    path = Path(file)
    if not name or path.suffix != ".py":
        offered = ", ".join(installed(kind))
        raise UserError(
            f"{kind} {place!r}: write FILE.py:function"
            + (f", or one of those that are installed: {offered}" if offered else "")
        )
    if not path.is_file():
        raise UserError(f"{kind} {place!r}: there is no file {file}")
    found = getattr(_imported(kind, place, path), name, None)
    if not callable(found):
        raise UserError(f"{kind} {place!r}: {file} has no function {name!r}; for example: {example}")
    return Plugin(kind, place, found, path)


def load_environment(place: str) -> Callable[[], Any]:
    """What makes an environment (`m1jax.rl.environment`) of this name anew for every attempt.

    Raises:
        UserError: there is none, or it has no reset and step.
    """
    example = "class Twice with reset(problem, rng) and step(text)"
    plugin = load("environment", place, example)
    try:
        made = plugin.found()
    except Exception as error:
        raise UserError(plugin.blame(error)) from error
    if not (callable(getattr(made, "reset", None)) and callable(getattr(made, "step", None))):
        raise UserError(f"environment {place!r}: it has no reset(problem, rng) and step(text); for example: {example}")
    return plugin.found


def located(error: BaseException) -> str:
    """The innermost line in which an error happened, and what it says."""
    where = _where(error, None)
    return f"{where}{': ' if where else ''}{described(error)}"


def described(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    text = str(error).splitlines()
    return type(error).__name__ + (f": {text[0]:.200}" if text else "")


def _callable(kind: Kind, place: str, found: object, where: str, example: str) -> object:
    if not callable(found):
        raise UserError(f"{kind} {place!r}: {where} is no function or class; for example: {example}")
    return found


def _imported(kind: Kind, place: str, file: Path) -> object:
    name = f"m1jax_{kind}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{kind} {place!r}: {_where(error, file)}: {described(error)}") from error
    return module


def _where(error: BaseException, file: Path | None) -> str:
    """The plug-in's own line in which it happened; where its file is not known, the innermost line."""
    if isinstance(error, SyntaxError) and file is not None:
        return f"{file}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is None or Path(frame.filename) == file]
    if own:
        return f"{own[-1].filename if file is None else file}, line {own[-1].lineno}"
    return "" if file is None else str(file)
