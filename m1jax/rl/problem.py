"""What is asked."""

import dataclasses
from typing import Literal

Verification = Literal["math", "exact", "constraints", "code"]
"""How an answer is judged: equal as mathematics, equal as text, by the instructions that it keeps, by the tests that it
passes."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its verifiable answer."""

    prompt: str
    answer: str
    thinking: str | None = None
    """a correct chain of thought, where the task knows one"""
    family: str = ""
    """what its accuracy is counted under, together with many others"""
    id: str = ""
    """which one it is within its task, where the task must find it again"""
    source: str = ""
    """name of the task it is from, in a mixture of several"""
    verification: Verification = "math"
    """of a problem from a file: what its answer is and how it is judged (`tasks.verification`)"""

    def demonstration(self, think: bool) -> str:
        """A correct response, with its chain of thought or straight away."""
        return f"<think>{self.thinking if think and self.thinking else ''}</think>{self.answer}"
