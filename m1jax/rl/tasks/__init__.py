"""Verifiable tasks: families with a chain of thought, tools or several turns, data files, reasoning-gym, plug-ins."""

from m1jax.rl import plugins
from m1jax.rl.tasks.base import Problem, Split, Task, Unjudged, split_response
from m1jax.rl.tasks.board import BoardMoves
from m1jax.rl.tasks.games import PACKAGES, Game
from m1jax.rl.tasks.guess import Guess
from m1jax.rl.tasks.mixture import Mixture
from m1jax.rl.tasks.plugin import Guarded, load_task
from m1jax.rl.tasks.reasoning_gym import LEVELS, ReasoningGym
from m1jax.rl.tasks.records import read_problems
from m1jax.rl.tasks.shop import Shop
from m1jax.rl.tasks.sums import DigitSums
from m1jax.rl.tasks.user import AllProblems, ProblemFile, UserProblems
from m1jax.rl.weights import Combination, parse

BUILT_IN = {"sums": DigitSums, "board": BoardMoves, "shop": Shop, "guess": Guess}
LOGIC = "logic"
"""all families of `LEVELS` together, under one weight"""


def get_task(combination: Combination) -> Task:
    """A task by name, or several with weights: `sums`, `sums=3+board`, `{"sums": 3, "board": 1}`.

    A name is that of a built-in family; of a plug-in, `FILE.py:name` or an entry point of `m1jax.tasks`; of a family of
    reasoning-gym (extra `tasks`), also with levels, `chain_sum@0-3`, or `logic`, all of those families together; of a
    game, `gymnasium:FrozenLake-v1` or `textarena:GuessTheNumber-v0` (extra `games`).

    Raises:
        UserError: no such task, one twice, no weight, or what a task needs is not installed.
    """
    weights = parse("task", combination)
    if LOGIC in weights:
        share = weights.pop(LOGIC) / len(LEVELS)
        weights = dict.fromkeys(LEVELS, share) | weights
    tasks = [_named(name) for name in weights]
    return tasks[0] if len(tasks) == 1 else Mixture(tasks, list(weights.values()))


def _named(name: str) -> Task:
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name.partition(":")[0] in PACKAGES:
        return Game(name)
    if plugins.is_plugin("task", name):
        return load_task(name)
    gym = ReasoningGym(name, [*BUILT_IN, *plugins.installed("task")])
    return Guarded(gym, lambda error: f"task {name}: reasoning-gym: {plugins.described(error)}")


__all__ = [
    "BUILT_IN",
    "LEVELS",
    "AllProblems",
    "BoardMoves",
    "DigitSums",
    "Guarded",
    "Mixture",
    "Problem",
    "ProblemFile",
    "ReasoningGym",
    "Split",
    "Task",
    "Unjudged",
    "UserProblems",
    "get_task",
    "load_task",
    "read_problems",
    "split_response",
]
