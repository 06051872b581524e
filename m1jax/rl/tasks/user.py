"""The user's own prompts and answers as a task; mathematical answers are judged by math-verify."""

import zlib
from collections.abc import Sequence

import numpy as np

from m1jax.errors import UserError
from m1jax.rl.math_judge import MathJudge
from m1jax.rl.tasks.base import HELDOUT_SHARE, Problem, Split


class UserProblems:
    """Problems from a file, visited in an order shuffled anew for every pass.

    About one in eight (by a hash of the prompt) is held out for evaluation and never trained on.

    Args:
        pairs: (prompt, answer), at least two different prompts.
        name: shown in messages, e.g. the path.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], name: str):
        self.name = name
        problems = {prompt: Problem(prompt, answer, None, name) for prompt, answer in pairs}
        if len(problems) < 2:
            raise UserError(f"{name}: {len(problems)} different prompts; at least 2 are needed (one is held out)")
        # The smallest hash is always held out, so that a short file has a held-out problem too.
        ranked = sorted(problems.values(), key=lambda p: (zlib.crc32(p.prompt.encode()), p.prompt))
        heldout = max(1, len(ranked) // HELDOUT_SHARE)
        self._splits = {"heldout": ranked[:heldout], "train": ranked[heldout:]}
        self._judge = MathJudge()
        self._order_of: tuple[Split, int, int] | None = None
        self._order = np.arange(0)

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        problems = self._splits[split]
        epoch, place = divmod(index, len(problems))
        if self._order_of != (split, seed, epoch):
            self._order_of = (split, seed, epoch)
            self._order = np.random.default_rng([seed, epoch]).permutation(len(problems))
        return problems[self._order[place]]

    def correct(self, problem: Problem, answer: str) -> bool:
        return self._judge.equal(problem.answer, answer)
