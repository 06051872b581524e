"""How much an engine holds, and in which shapes it works."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Sizes of an engine's memory and of its programs: of each part, where rows are spread over a mesh.

    A part keeps its sequences, their states and pages, and the prefixes they share, on its own devices.
    """

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
    """rows x tokens that may be prefilled between decode steps, however few decode: how long those may have to wait"""
    parts: int = 1
    """with several, the only decode program is that of all rows"""
    ahead: bool = False
    """whether the next decode call is on its way before what the last one wrote is read: the host's work takes no time
    then, and who comes anew waits for a call more"""

    @property
    def slots(self) -> int:
        """Lightning states: those of the rows, then those of kept prefixes."""
        return self.rows + self.snapshots

    def pages_for(self, tokens: int) -> int:
        return math.ceil(tokens / self.page_size)
