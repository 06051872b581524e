"""What constrained rows may draw, token by token, while a batch is being decoded."""

from __future__ import annotations

from collections.abc import Sequence as Several

import jax
import numpy as np
from jaxtyping import Int, UInt32

from m1jax.inference.mail import Mailbox
from m1jax.inference.sampling import ALL
from m1jax.inference.sequence import Sequence


class Guides:
    """The matchers of a batch.

    Args:
        sequences: of the batch; those without a matcher may draw everything.
        places: their rows in the decode program.
        rows: of that program.
    """

    def __init__(self, sequences: Several[Sequence], places: Int[np.ndarray, " n"], rows: int, vocab_size: int) -> None:
        self._shape = (rows, -(-vocab_size // 32))
        self._rows = [(place, s) for place, s in zip(places.tolist(), sequences) if s.matcher is not None]

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
            self._show(tokens)
        allowed = np.full(self._shape, ALL, np.uint32)
        self._look_up(allowed)
        return allowed

    def answer(self, mailbox: Mailbox, first: int, steps: int) -> None:
        """The same for a program of so many steps that asks by mail, from this number on, until it ends."""
        try:
            for number in range(first, first + steps):
                if not self._rows:
                    break
                self._look_up(mailbox.answers)
                mailbox.answer(number)
                self._show(mailbox.hear(number))
        finally:  # nobody waits for what will not come
            mailbox.answer(first + steps - 1)

    def _show(self, tokens: Int[np.ndarray, " rows"]) -> None:
        """What was drawn; rows at -1 have ended."""
        self._rows = [(place, sequence) for place, sequence in self._rows if tokens[place] >= 0]
        for place, sequence in self._rows:
            sequence.show(int(tokens[place]))

    def _look_up(self, allowed: UInt32[np.ndarray, "rows words"]) -> None:
        for place, sequence in self._rows:
            assert sequence.matcher is not None
            allowed[place] = sequence.matcher.allowed(sequence.left - sequence.ahead)
