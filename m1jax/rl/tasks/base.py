"""What a verifiable task is: problems made from seeds, and the form of a response."""

import dataclasses
import re
import zlib
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

Split = Literal["train", "heldout"]

_RESPONSE = re.compile(r"<think>((?:(?!</?think>).)*)</think>((?:(?!</?think>).)+)", re.DOTALL)
HELDOUT_SHARE = 8
"""one problem in so many is held out"""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its verifiable answer."""

    prompt: str
    answer: str
    thinking: str | None = None
    """a correct chain of thought, where the task knows one"""
    family: str = ""

    def demonstration(self, think: bool) -> str:
        """A correct response, with its chain of thought or straight away."""
        return f"<think>{self.thinking if think and self.thinking else ''}</think>{self.answer}"


class Task(Protocol):
    """A source of problems and their judge."""

    name: str

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        """A pure function of its arguments, so that a counter is all there is to resume."""
        ...

    def correct(self, problem: Problem, answer: str) -> bool:
        """Whether the text after `</think>` answers the problem."""
        ...


class Family:
    """A generated family: a subclass draws problems, this class keeps train and held-out apart.

    The split is decided by a hash of the prompt, not by the seed alone: small families repeat themselves, and a
        held-out problem
    must never have been trained on.
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


class Mixture:
    """Several tasks in turn."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = {task.name: task for task in tasks}
        self.name = "+".join(self.tasks)

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        turn = list(self.tasks.values())
        return turn[index % len(turn)].problem(split, seed, index // len(turn))

    def correct(self, problem: Problem, answer: str) -> bool:
        return self.tasks[problem.family].correct(problem, answer)


def split_response(text: str) -> tuple[str, str] | None:
    """(thinking, answer) of a response `<think>...</think>answer`; None where it has another form."""
    match = _RESPONSE.fullmatch(text)
    return None if match is None or not match[2].strip() else (match[1], match[2].strip())
