"""Following a piece over a chess board whose edges are joined, and which is turned over on the way."""

import numpy as np

from m1jax.rl.tasks.base import Family, Problem

_FILES = "abcdefgh"
# What an instruction makes of a file or rank 0 ... 7: one back, one on, mirrored. Mirrors do not commute with steps, so
# that counting the instructions does not give the answer.
_STEPS = (lambda x: (x - 1) % 8, lambda x: (x + 1) % 8, lambda x: 7 - x)
_ACROSS, _ALONG = "<>|", "v^-"


class BoardMoves(Family):
    """`>^|v<-|^>v:c5=` (from c5: right and up, mirrored and down, left and mirrored, ...) ->
    `<think>d6e5d4e5f4</think>f4`: every square on the way."""

    name = "board"

    def __init__(self, moves: int = 5):
        self.moves = moves

    def draw(self, rng: np.random.Generator) -> Problem:
        file, rank = (int(n) for n in rng.integers(8, size=2))
        squares = [f"{_FILES[file]}{rank + 1}"]
        moves = rng.integers(3, size=(self.moves, 2))
        for across, along in moves:
            file, rank = _STEPS[across](file), _STEPS[along](rank)
            squares.append(f"{_FILES[file]}{rank + 1}")
        instructions = "".join(_ACROSS[across] + _ALONG[along] for across, along in moves)
        return Problem(f"{instructions}:{squares[0]}=", squares[-1], "".join(squares[1:]), self.name)
