"""A chain of operations on one digit, from left to right, modulo 10."""

import numpy as np

from m1jax.rl.tasks.base import Family, Problem

_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class ModularChain(Family):
    """`mod10 7*3-4+9=` -> `<think>7*3=1,1-4=7,7+9=6</think>6`."""

    name = "chain"

    def __init__(self, steps: int = 4):
        self.steps = steps

    def draw(self, rng: np.random.Generator) -> Problem:
        value = int(rng.integers(10))
        prompt, thinking = f"mod10 {value}", []
        for _ in range(self.steps):
            operation, operand = "+-*"[rng.integers(3)], int(rng.integers(10))
            result = _OPERATIONS[operation](value, operand) % 10
            prompt += f"{operation}{operand}"
            thinking.append(f"{value}{operation}{operand}={result}")
            value = result
        return Problem(f"{prompt}=", str(value), ",".join(thinking), self.name)
