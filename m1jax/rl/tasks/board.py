"""A piece that makes the same move again and again on a chess board whose edges are joined."""

import numpy as np

from m1jax.rl.tasks.base import Family, Problem

_FILES = "abcdefgh"


class BoardMoves(Family):
    """`+2-1x3:c5=` (from c5: two files right and one rank down, three times) -> `<think>2e41g30a2</think>a2`: how
    often still, and the square."""

    name = "board"

    def __init__(self, most: int = 4):
        self.most = most

    def draw(self, rng: np.random.Generator) -> Problem:
        file, rank = (int(n) for n in rng.integers(8, size=2))
        right, up = (int(n) for n in rng.choice([-2, -1, 1, 2], size=2))
        times = int(rng.integers(2, self.most + 1))
        states = [f"{_FILES[(file + right * i) % 8]}{(rank + up * i) % 8 + 1}" for i in range(times + 1)]
        thinking = "".join(f"{left}{state}" for left, state in zip(range(times - 1, -1, -1), states[1:]))
        return Problem(f"{right:+d}{up:+d}x{times}:{states[0]}=", states[-1], thinking, self.name)
