"""What constrained rows may draw, token by token, while a batch is being decoded."""

from __future__ import annotations

import collections
from collections.abc import Sequence as Several

import jax
import numpy as np
from jaxtyping import Int, Int32, UInt32

from m1jax.inference.mail import Mailbox
from m1jax.inference.sampling import ALL
from m1jax.inference.sequence import Sequence


class Guides:
    """The matchers of a decode call.

    Args:
        sequences: of the batch; those without a matcher may draw everything.
        allowances: what they may write in this call, and in the one before if it is still on its way.
        places: their rows in the decode program.
        rows: of that program.
        after: of the call before, if it is on its way, where its rows were the same.
    """

    def __init__(
        self,
        sequences: Several[Sequence],
        allowances: Several[int],
        places: Int[np.ndarray, " n"],
        rows: int,
        vocab_size: int,
        after: Guides | None = None,
    ) -> None:
        self._shape, self._after = (rows, -(-vocab_size // 32)), after
        constrained = [s.matcher is not None for s in sequences]
        self._rows = [row for row, is_one in zip(zip(places.tolist(), sequences), constrained) if is_one]
        self._left = {s: left for s, left, is_one in zip(sequences, allowances, constrained) if is_one}
        self._written = collections.Counter[Sequence]()
        self._ended = set[Sequence]()

    @property
    def rows(self) -> list[int]:
        """Those that are constrained."""
        return [place for place, _ in self._rows]

    def follow(self, drawn: Int[jax.Array, " rows"] | None) -> UInt32[np.ndarray, "rows words"] | None:
        """What each row may draw next (`sampling.unpacked`), after what was drawn last, if anything was; None: no row
        goes on, all of which have -1 there."""
        if drawn is not None:
            tokens = np.asarray(drawn)
            if not (tokens >= 0).any():
                return None
            self._rows = [(place, sequence) for place, sequence in self._rows if tokens[place] >= 0]
            for place, sequence in self._rows:
                sequence.show(int(tokens[place]))
        allowed = np.full(self._shape, ALL, np.uint32)
        self._look_up(allowed)
        return allowed

    def answer(self, mailbox: Mailbox, first: int, steps: int) -> None:
        """The same for a program of so many steps that asks by mail, from this number on, until it ends."""
        try:
            self._go_on()
            for number in range(first, first + steps):
                if not self._rows:
                    break
                self._look_up(mailbox.answers)
                mailbox.answer(number)
                self._hear(mailbox.hear(number))
        finally:  # nobody waits for what will not come
            mailbox.answer(first + steps - 1)
            mailbox.hear(first + steps - 1)

    def _go_on(self) -> None:
        """From where the call before has ended."""
        if self._after is not None:
            before, self._after = self._after, None
            self._left = {s: left - before._written[s] for s, left in self._left.items() if s not in before._ended}
            self._rows = [(place, s) for place, s in self._rows if self._left.get(s, 0) > 0]

    def _hear(self, words: Int32[np.ndarray, " rows"]) -> None:
        """What rows have written (`programs.decode_on`)."""
        rows, self._rows = self._rows, []
        for place, sequence in rows:
            word = int(words[place])
            if word < 0:
                continue
            sequence.show(word >> 1)
            self._written[sequence] += 1
            if word & 1:
                self._ended.add(sequence)
            elif self._written[sequence] < self._left[sequence]:
                self._rows.append((place, sequence))

    def _look_up(self, allowed: UInt32[np.ndarray, "rows words"]) -> None:
        for place, sequence in self._rows:
            allowed[place] = sequence.allowed()
