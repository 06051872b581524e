"""Adding the same digit again and again, modulo 100: the steps are small, the end is out of sight."""

import numpy as np

from m1jax.rl.tasks.base import Family, Problem


class RepeatedSums(Family):
    """`+5x3:37=` (5 three times on 37) -> `<think>242147052</think>52`: how often still, and the sum so far."""

    name = "sums"

    def __init__(self, most: int = 4):
        self.most = most

    def draw(self, rng: np.random.Generator) -> Problem:
        start, step, times = int(rng.integers(100)), int(rng.integers(1, 10)), int(rng.integers(2, self.most + 1))
        states = [f"{(start + step * i) % 100:02d}" for i in range(times + 1)]
        thinking = "".join(f"{left}{state}" for left, state in zip(range(times - 1, -1, -1), states[1:]))
        return Problem(f"+{step}x{times}:{states[0]}=", states[-1], thinking, self.name)
