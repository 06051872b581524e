"""Prices that must be looked up and products that must be calculated: nobody knows them by heart."""

import ast
import functools
import operator
import zlib
from collections.abc import Callable

import numpy as np

from m1jax.agent import Toolbox
from m1jax.rl.environments.tools import ToolUse
from m1jax.rl.tasks.base import Family, Problem

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def look_up(item: str) -> int:
    """The price of an item.

    Args:
        item: three small letters.
    """
    if len(item) != 3 or not set(item) <= set(_LETTERS):
        raise ValueError(f"there is no item {item!r}")
    return 10 + zlib.crc32(item.encode()) % 90


def calculate(expression: str) -> float:
    """The value of an expression of numbers, + - * / and parentheses."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(int() | float() as number):
                return number
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
                return _OPERATIONS[type(operation)](value(left), value(right))
        raise ValueError("only numbers, + - * / and parentheses can be calculated")

    if len(expression) > 100:
        raise ValueError("the expression is longer than 100 characters")
    return value(ast.parse(expression, mode="eval").body)


class Shop(Family):
    """`37*qzk=` (37 items qzk, of which one costs 58) -> `2146`, by calling `look_up` and `calculate`."""

    name = "shop"

    def __init__(self):
        self.environment = functools.partial(ToolUse, Toolbox([look_up, calculate]))

    def draw(self, rng: np.random.Generator) -> Problem:
        item, count = "".join(rng.choice(list(_LETTERS), size=3)), int(rng.integers(10, 100))
        return Problem(f"{count}*{item}=", str(count * look_up(item)), family=self.name)
