"""What a verifiable task is: problems made from seeds, and the form of a response."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np

from m1jax.rl.problem import Problem

Split = Literal["train", "heldout"]

_RESPONSE = re.compile(r"<think>((?:(?!</?think>).)*)</think>((?:(?!</?think>).)+)", re.DOTALL)
HELDOUT_SHARE = 8
"""one problem in so many is held out"""
_LONGEST_LAP = 10_000


class Unjudged(Exception):
    """Why an answer could not be judged, in one line."""


class Task(Protocol):
    """A source of problems and their judge.

    A task in which the policy speaks more than once has an attribute `environment`, too (`m1jax.rl.environment`); one
    in which several spellings are the same answer has a method `same` (`Same`).
    """

    name: str

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        """A pure function of its arguments, so that a counter is all there is to resume."""
        ...

    def correct(self, problem: Problem, answer: str) -> bool:
        """Whether the text after `</think>` answers the problem.

        Raises:
            Unjudged: that cannot be said.
        """
        ...


Same = Callable[[Problem, str, str], bool]
"""whether two answers to a problem are the same one"""


def same_text(problem: Problem, one: str, other: str) -> bool:
    """Where nothing else is known: the same text."""
    return one == other


def same_of(task: Task) -> Same:
    """Which answers are the same in a task."""
    return getattr(task, "same", same_text)


class Family:
    """A generated family: a subclass draws problems, this class keeps train and held-out apart.

    The split is decided by a hash of the prompt, not by the seed alone: small families repeat themselves, and a
    held-out problem must never have been trained on.
    """

    name = ""

    def draw(self, rng: np.random.Generator) -> Problem:
        raise NotImplementedError

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), split == "heldout", seed, index])
        while True:
            problem = self.draw(rng)
            heldout = zlib.crc32(problem.prompt.encode()) % HELDOUT_SHARE == 0
            if heldout == (split == "heldout"):
                return problem

    def correct(self, problem: Problem, answer: str) -> bool:
        return answer.strip() == problem.answer


class Turns:
    """Whose turn it is among several sources of which each is to come up in proportion to its weight.

    The order repeats itself after as few turns as make the proportions whole (of many odd weights, after some
    thousands, which come close), and is spread evenly within.
    """

    def __init__(self, weights: Sequence[float]):
        smallest = min(weights)
        ratios = [Fraction(weight / smallest).limit_denominator(100) for weight in weights]
        whole = math.lcm(*(ratio.denominator for ratio in ratios))
        if whole * sum(ratios) > _LONGEST_LAP:
            whole = _LONGEST_LAP / sum(ratios)
        self._counts = [max(1, round(ratio * whole)) for ratio in ratios]
        # Every turn each source gains its share, and the one that has most gives a whole lap's.
        gained, shares = np.zeros(len(weights), np.int64), np.array(self._counts)
        self._order: list[int] = []
        for _ in range(sum(self._counts)):
            gained += shares
            self._order.append(int(gained.argmax()))
            gained[self._order[-1]] -= shares.sum()
        seen: Counter[int] = Counter()
        self._before = []
        for source in self._order:
            self._before.append(seen[source])
            seen[source] += 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(which source, how often it has come up before) at a turn."""
        lap, place = divmod(index, len(self._order))
        source = self._order[place]
        return source, lap * self._counts[source] + self._before[place]


class Order(Protocol):
    """Which of several sources comes when."""

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(which source, how often it has come up before) at a turn."""
        ...


def split_response(text: str) -> tuple[str, str] | None:
    """(thinking, answer) of a response `<think>...</think>answer`; None where it has another form."""
    match = _RESPONSE.fullmatch(text)
    return None if match is None or not match[2].strip() else (match[1], match[2].strip())
