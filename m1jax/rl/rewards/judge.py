"""What a judge is."""

from typing import NamedTuple, Protocol

from m1jax.rl.tasks.base import Problem, Unjudged
from m1jax.rl.types import Episode

__all__ = ["Judge", "Unjudged", "Verdict"]


class Verdict(NamedTuple):
    """What was found out about one episode; its reward is the sum of the two parts."""

    answer: float
    """for what it says"""
    format: float
    """for the form in which it says it"""
    correct: bool


class Judge(Protocol):
    """Judges episodes, each for itself."""

    def __call__(self, problem: Problem, episode: Episode) -> Verdict:
        """A pure function of its arguments.

        Raises:
            Unjudged: this one cannot be judged; it is left out of its group.
        """
        ...
