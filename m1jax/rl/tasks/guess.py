"""Guessing a number by what is said of each guess."""

import numpy as np

from m1jax.rl.environment import Messages, Step
from m1jax.rl.tasks.base import Family, Problem

HIGHEST = 999


class GuessingGame:
    """Says `<` where the number is smaller than the guess, `>` where it is greater, `?` where no number was guessed.

    A turn's guess is what stands behind its `</think>`, if it has one. Who finds the number earns 1, and 0 who has not
    found it in as many turns as halving takes.
    """

    def __init__(self):
        self._number, self._left = 0, HIGHEST.bit_length()

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        self._number = int(problem.answer)
        return [{"role": "user", "content": f"0-{HIGHEST}:"}]

    def step(self, text: str) -> Step:
        self._left -= 1
        guess = text.rpartition("</think>")[2].strip()
        number = int(guess) if guess.isdecimal() and len(guess) < 10 else None
        if number == self._number:
            return Step([], True, 1.0)
        if not self._left:
            return Step([], True, 0.0)
        said = "?" if number is None else "<" if self._number < number else ">"
        return Step([{"role": "user", "content": said}], False)


class Guess(Family):
    """A number from 0 to 999, in ten guesses."""

    name = "guess"
    environment = GuessingGame

    def draw(self, rng: np.random.Generator) -> Problem:
        number = str(rng.integers(HIGHEST + 1))
        return Problem(f"the number is {number}", number, family=self.name)
