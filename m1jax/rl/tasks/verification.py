"""The judges that records of data files name."""

import dataclasses
import functools
import weakref

from m1jax.rl.math_judge import MathJudge
from m1jax.rl.rewards import code, constraints
from m1jax.rl.tasks.base import Problem
from m1jax.sandbox import Limits, Pool


class Verifier:
    """Judges answers by their problem's `verification`; what that takes (a helper process, a sandbox) starts when it is
    first needed.

    Args:
        limits: of each run of a program; `Limits()` unless given.
    """

    def __init__(self, limits: Limits | None = None):
        self._limits = limits
        self._math = MathJudge()

    def correct(self, problem: Problem, answer: str) -> bool:
        """Whether this is the answer.

        Raises:
            UserError: nobody can be judged: programs cannot be isolated on this system, or the helper for mathematics
                does not live.
        """
        match problem.verification:
            case "exact":
                return answer.strip() == problem.answer.strip()
            case "constraints":
                return not constraints.broken(constraints.from_json(problem.answer), answer)
            case "code":
                tests = code.CodeTests.from_json(problem.answer)
                return code.grade(self._pool, code.extract_program(answer), tests, self._limits).correct
            case "math":
                # math-verify reads LaTeX between dollars alone, and data files have it without.
                bare = "\\" in problem.answer and "$" not in problem.answer
                return self._math.equal(f"${problem.answer}$" if bare else problem.answer, answer)

    def same(self, problem: Problem, one: str, other: str) -> bool:
        """Whether two answers to a problem say the same: as mathematics, where that is how it is judged, else as text.

        Raises:
            UserError: as `correct`.
        """
        return one == other or (
            problem.verification == "math" and self.correct(dataclasses.replace(problem, answer=one), other)
        )

    @functools.cached_property
    def _pool(self) -> Pool:
        pool = Pool(1)
        weakref.finalize(self, pool.close)
        return pool
