"""Combinations with weights as data: `sums=3+board` in a text, `{"sums": 3, "board": 1}` in a file."""

from collections.abc import Mapping

from m1jax.errors import UserError

Combination = str | Mapping[str, float]


def parse(kind: str, combination: Combination) -> dict[str, float]:
    """Name -> weight, in their order; 1 where a text gives none.

    Raises:
        UserError: nothing is named, something twice, or a weight is no positive number.
    """
    if isinstance(combination, str):
        parts = [part.rpartition("=")[::2] if "=" in part else (part, "1") for part in combination.split("+")]
    else:
        parts = list(combination.items())
    found: dict[str, float] = {}
    for name, weight in parts:
        name = name.strip()
        if not name:
            raise UserError(f"{kind} {combination!r}: no name in it; write NAME, or NAME=2.5+NAME")
        if name in found:
            raise UserError(f"{kind} {combination!r} names one {kind} twice: {name}")
        try:
            found[name] = float(weight)
        except (TypeError, ValueError):
            found[name] = 0.0
        if not 0 < found[name] < float("inf"):
            raise UserError(f"{kind} {combination!r}: {weight!r} is no weight; write {name}=2.5")
    if not found:
        raise UserError(f"{kind}: the combination is empty; name at least one")
    return found
