"""The families of reasoning-gym (extra `tasks`) as tasks: problems made from seeds and judged by their own scorers."""

import difflib
import importlib
from typing import Any

from m1jax.errors import UserError
from m1jax.rl.tasks.base import Problem, Split


class ReasoningGym:
    """One family by its name there, e.g. `chain_sum`; a response is right where the family's score reaches 0.99.

    Raises:
        UserError: the extra is not installed, there is no family of this name, or it cannot be constructed.
    """

    def __init__(self, family: str):
        try:
            self._gym = importlib.import_module("reasoning_gym")
        except ImportError as error:
            raise UserError(
                f"task {family!r} is not built in, and reasoning-gym is not installed: "
                "pip install 'm1jax[tasks]' (needs a C compiler)"
            ) from error
        known = importlib.import_module("reasoning_gym.factory").DATASETS
        if family not in known:
            near = difflib.get_close_matches(family, known, n=5, cutoff=0)
            raise UserError(
                f"task {family!r} is neither built in nor one of the {len(known)} families of reasoning-gym; "
                f"the nearest are {', '.join(near)}"
            )
        self.name = family
        try:
            self._scorer = self._dataset(0)
        except Exception as error:  # its generators are many people's work
            raise UserError(f"task {family!r}: reasoning-gym cannot make problems of this family ({error})") from error

    def _dataset(self, seed: int) -> Any:
        return self._gym.create_dataset(self.name, size=1, seed=seed)

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        # Odd seeds are held out: their generators share no problem by construction, only (rarely) by chance.
        number = 2 * (seed * 1_000_003 + index) + (split == "heldout")
        entry = self._dataset(number)[0]
        return Problem(entry["question"], str(entry["answer"]), family=self.name, id=str(number))

    def correct(self, problem: Problem, answer: str) -> bool:
        entry = self._dataset(int(problem.id))[0]
        return self._scorer.score_answer(answer=answer, entry=entry) >= 0.99
