"""Adding digits one by one, modulo 10: every step is small, the end is out of sight."""

import numpy as np

from m1jax.rl.tasks.base import Family, Problem


class DigitSums(Family):
    """`+3815962470=` (3 + 8 + 1 ... modulo 10) -> `<think>3127624855</think>5`: the sum so far, digit by digit."""

    name = "sums"

    def __init__(self, digits: int = 10):
        self.digits = digits

    def draw(self, rng: np.random.Generator) -> Problem:
        digits = rng.integers(10, size=self.digits)
        thinking = "".join(str(total) for total in np.cumsum(digits) % 10)
        return Problem(f"+{''.join(map(str, digits))}=", thinking[-1], thinking, self.name)
