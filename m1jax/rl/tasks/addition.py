"""Addition of two numbers, digit by digit with the carry written down."""

import numpy as np

from m1jax.rl.tasks.base import Family, Problem


class Addition(Family):
    """`58+67=` -> `<think>8+7=15,5+6+1=12</think>125`."""

    name = "addition"

    def __init__(self, digits: int = 3):
        self.digits = digits

    def draw(self, rng: np.random.Generator) -> Problem:
        a, b = (int(rng.integers(10 ** (self.digits - 1), 10**self.digits)) for _ in range(2))
        steps, carry = [], 0
        for x, y in zip(reversed(str(a)), reversed(str(b))):
            total = int(x) + int(y) + carry
            steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
            carry = total // 10
        return Problem(f"{a}+{b}=", str(a + b), ",".join(steps), self.name)
