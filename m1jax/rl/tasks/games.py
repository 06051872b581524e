"""Games of other packages as tasks: a problem is a seed, and the game rewards."""

from m1jax.rl.environment import MakeEnvironment
from m1jax.rl.environments import gymnasium, textarena
from m1jax.rl.tasks.base import Problem, Split

PACKAGES = {"gymnasium": gymnasium.make, "textarena": textarena.make}


class Game:
    """`PACKAGE:NAME`. Even seeds are trained on, odd ones held out.

    Raises:
        UserError: the package is not installed, or has no such game.
    """

    def __init__(self, place: str):
        package, _, name = place.partition(":")
        self.name = place
        self.environment: MakeEnvironment = PACKAGES[package](name)

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        number = (2 * (seed * 1_000_003 + index) + (split == "heldout")) % 2**31
        return Problem(f"{self.name}, seed {number}", "", family=self.name, id=str(number))

    def correct(self, problem: Problem, answer: str) -> bool:
        return False  # a game that does not reward was not won
