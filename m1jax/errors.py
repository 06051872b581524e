"""The one exception for what a user can put right, checks that raise it, its wording, and an exit status."""

import math
from collections.abc import Sequence
from typing import Any

STOPPED = 143
"""Exit status of a training that was asked to stop, has saved, and goes on when it is started again: 128 + SIGTERM, so
that nobody takes it for a finished one."""
UNTRAINED = 3
"""Exit status of a training that came to its end without a single update: nothing was learnt."""


class UserError(Exception):
    """Something the user gave is wrong: a file, a configuration, an argument.

    The message says in one or two lines what is wrong, where (path, line, tensor), what was expected and what to do.
    The command line prints it without a traceback and exits with status 2; library callers see an ordinary exception.
    Raise it before any work is lost, and never for a bug of our own.
    """


def require_seed(seed: int) -> None:
    """Raises UserError for a seed that the random generators do not take."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed = {seed} must lie between 0 and {2**32 - 1}")


def require_positive(options: Any, *names: str, zero: bool = False) -> None:
    """Raises UserError naming the first of these fields of `options` that is not above zero (`zero`: nor zero)."""
    for name in names:
        value = getattr(options, name)
        if not (value > 0 or (zero and value == 0)):  # so that NaN is refused
            raise UserError(f"{name} = {value} must be {'zero or more' if zero else 'more than zero'}")


def require_finite(options: Any, *names: str) -> None:
    """Raises UserError naming the first of these fields of `options` that is infinite or no number."""
    for name in names:
        if not math.isfinite(value := getattr(options, name)):
            raise UserError(f"{name} = {value} must be a finite number")


def shortened(problems: Sequence[str], most: int = 3) -> str:
    """The first of what is wrong, and how many more there are."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {more} more" if more > 0 else "")
