"""A chain of additions and subtractions modulo 10, from left to right; each step has a letter."""

import numpy as np

from m1jax.rl.tasks.base import Family, Problem

_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}


class ModularChain(Family):
    """`5A-1B+3C+3D-2=` -> `<think>5A-1=4B+3=7C+3=0D-2=8</think>8`."""

    name = "chain"

    def __init__(self, steps: int = 4, largest: int = 3):
        self.steps, self.largest = steps, largest

    def draw(self, rng: np.random.Generator) -> Problem:
        value = int(rng.integers(10))
        prompt = thinking = str(value)
        for i in range(self.steps):
            sign = "+-"[rng.integers(2)]
            operand = int(rng.integers(1, self.largest + 1))
            value = _OPERATIONS[sign](value, operand) % 10
            step = f"{chr(ord('A') + i)}{sign}{operand}"
            prompt += step
            thinking += f"{step}={value}"
        return Problem(f"{prompt}=", str(value), thinking, self.name)
