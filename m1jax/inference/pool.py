"""Numbered places, counted: pages of keys and values, rows of the batch, slots of kept states."""

import heapq
from collections.abc import Iterable


class Pool:
    """Hands out the numbers of a range, lowest first. A number may have several holders; the last one frees it."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers
        self._free = list(numbers)  # sorted, hence a heap
        self._holders = dict.fromkeys(numbers, 0)

    @property
    def free(self) -> int:
        """How many numbers nobody holds."""
        return len(self._free)

    def holders(self, number: int) -> int:
        return self._holders[number]

    def take(self, count: int) -> list[int]:
        """That many free numbers, each with one holder. There must be as many (`free`)."""
        assert count <= len(self._free), f"{count} of {len(self._free)} free places"
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for number in taken:
            self._holders[number] = 1
        return taken

    def share(self, numbers: Iterable[int]) -> None:
        """One more holder for each."""
        for number in numbers:
            assert self._holders[number], f"place {number} is free"
            self._holders[number] += 1

    def release(self, numbers: Iterable[int]) -> None:
        """One holder less for each."""
        for number in numbers:
            assert self._holders[number], f"place {number} is free"
            self._holders[number] -= 1
            if not self._holders[number]:
                heapq.heappush(self._free, number)
