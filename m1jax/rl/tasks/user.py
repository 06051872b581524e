"""The problems of data files as a task; each record says how it is judged."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from m1jax.errors import UserError
from m1jax.rl.tasks.base import HELDOUT_SHARE, Order, Problem, Split, Turns
from m1jax.rl.tasks.verification import Verifier


class ProblemFile(NamedTuple):
    """Problems from one file."""

    path: str
    problems: Sequence[Problem]
    weight: float = 1.0
    """how many problems are taken from it, in proportion to the other files' weights"""


class UserProblems:
    """Problems from files, each gone through in an order shuffled anew for every pass.

    About one different prompt in eight (by a hash of it) is held out for evaluation and never trained on, whichever
    files it is in.

    Raises:
        UserError: fewer than two different prompts, or a file whose prompts are all held out.
    """

    def __init__(self, files: Sequence[ProblemFile]):
        self.name = "+".join(file.path for file in files)
        prompts = {problem.prompt for file in files for problem in file.problems}
        if len(prompts) < 2:
            raise UserError(f"{self.name}: {len(prompts)} different prompts; at least 2 are needed (one is held out)")
        # The smallest hash is always held out, so that a short file has a held-out problem too.
        ranked = sorted(prompts, key=lambda prompt: (zlib.crc32(prompt.encode()), prompt))
        rank = {prompt: number for number, prompt in enumerate(ranked)}
        last = max(1, len(ranked) // HELDOUT_SHARE)
        heldout: dict[str, Problem] = {}
        self._train: list[list[Problem]] = []
        for file in files:
            problems = {problem.prompt: problem for problem in file.problems}
            ordered = sorted(problems.values(), key=lambda problem: rank[problem.prompt])
            heldout |= {problem.prompt: problem for problem in ordered if rank[problem.prompt] < last}
            self._train.append([problem for problem in ordered if rank[problem.prompt] >= last])
            if not self._train[-1]:
                raise UserError(f"{file.path}: all its {len(problems)} prompts are held out; it needs more")
        self._heldout = [heldout[prompt] for prompt in ranked[:last]]
        self.parts = [file.path for file in files]
        self.weights = [file.weight for file in files]
        self.turns: Order = Turns(self.weights)
        self._verifier = Verifier()
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        source, number = (-1, index) if split == "heldout" else self.turns[index]
        problems = self._heldout if split == "heldout" else self._train[source]
        epoch, place = divmod(number, len(problems))
        known = self._orders.get((source, seed))
        if known is None or known[0] != epoch:
            entropy = [seed, epoch] if source < 1 else [seed, epoch, source]
            known = epoch, np.random.default_rng(entropy).permutation(len(problems))
            self._orders[source, seed] = known
        return problems[known[1][place]]

    def by_part(self, problems: Sequence[Problem]) -> list[list[Problem]]:
        """Those to train on of each file."""
        return [[problem for problem in problems if problem in mine] for mine in map(set, self._train)]

    def correct(self, problem: Problem, answer: str) -> bool:
        return self._verifier.correct(problem, answer)

    def same(self, problem: Problem, one: str, other: str) -> bool:
        return self._verifier.same(problem, one, other)


class AllProblems:
    """Every problem of files once, in their order; none is held out. What an evaluation asks."""

    def __init__(self, files: Sequence[ProblemFile]):
        self.name = "+".join(file.path for file in files)
        self.problems = list({problem.prompt: problem for file in files for problem in file.problems}.values())
        self._verifier = Verifier()

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        return self.problems[index % len(self.problems)]

    def correct(self, problem: Problem, answer: str) -> bool:
        return self._verifier.correct(problem, answer)

    def same(self, problem: Problem, one: str, other: str) -> bool:
        return self._verifier.same(problem, one, other)
