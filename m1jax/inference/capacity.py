"""How much an engine holds, and in which shapes it works."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Sizes of an engine's memory and of its programs."""

    rows: int
    """sequences in work at once"""
    max_length: int
    """tokens of one sequence, prompt and completion"""
    page_size: int
    """tokens whose keys and values lie in one page"""
    pages: int
    """of keys and values, those of kept prefixes among them"""
    snapshots: int
    """kept prefixes: each has the states of all lightning layers"""
    steps: int
    """decode steps between two looks of the scheduler"""
    decode: tuple[int, ...]
    """rows of the decode programs, ascending; the last is `rows`"""
    prefill: tuple[tuple[int, int], ...]
    """(rows, tokens) of the prefill programs, by ascending product"""
    stall: int
    """rows x tokens that may be prefilled between decode steps: how long those who decode may have to wait"""

    @property
    def slots(self) -> int:
        """Lightning states: those of the rows, then those of kept prefixes."""
        return self.rows + self.snapshots

    def pages_for(self, tokens: int) -> int:
        return math.ceil(tokens / self.page_size)
