"""Verifiable tasks: two built-in families with a chain of thought, the user's own problems, and those of
reasoning-gym."""

from m1jax.rl.tasks.base import Mixture, Problem, Split, Task, split_response
from m1jax.rl.tasks.board import BoardMoves
from m1jax.rl.tasks.reasoning_gym import ReasoningGym
from m1jax.rl.tasks.sums import DigitSums
from m1jax.rl.tasks.user import ProblemFile, UserProblems

BUILT_IN = {"sums": DigitSums, "board": BoardMoves}


def get_task(name: str) -> Task:
    """A task by name: a built-in family, several joined by `+` (`sums+board`), or a family of reasoning-gym.

    Raises:
        UserError: no such task, or it needs an extra that is not installed.
    """
    parts = [BUILT_IN[part]() if part in BUILT_IN else ReasoningGym(part) for part in name.split("+")]
    return parts[0] if len(parts) == 1 else Mixture(parts)


__all__ = [
    "BUILT_IN",
    "BoardMoves",
    "DigitSums",
    "Mixture",
    "Problem",
    "ProblemFile",
    "ReasoningGym",
    "Split",
    "Task",
    "UserProblems",
    "get_task",
    "split_response",
]
