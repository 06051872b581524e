"""Statistics that add up: of parts of a batch, in whatever order they are merged, comes the statistic of the whole.

Each is a registered dataclass of float32 arrays under jit and of numbers on the host, so that a step can return them,
micro-batches merge them, and a checkpoint keep them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Scalar = jax.Array | np.ndarray | float


@runtime_checkable
class Statistic(Protocol):
    """What a part of a batch says about the whole."""

    def merge(self, other: Self) -> Self:
        """Of both parts together."""
        ...

    def empty(self) -> Self:
        """Of no part at all: merging with it changes nothing. Reads shapes and dtypes only."""
        ...

    def value(self) -> float | None:
        """The figure that is recorded; None where there is none."""
        ...


Stats = dict[str, Statistic]
S = TypeVar("S", bound=Statistic)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """A total."""

    sum: Scalar

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.sum + other.sum)

    def empty(self) -> "Sum":
        return Sum(jnp.zeros((), self.sum.dtype))  # pyright: ignore[reportAttributeAccessIssue]

    def value(self) -> float | None:
        return _finite(self.sum)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean: sum of weight times value, and of weight."""

    sum: Scalar
    count: Scalar

    @classmethod
    def of(cls, values: Float[Array, "..."], weights: Float[Array, "..."]) -> "Mean":
        """Values count where their weight is not zero; elsewhere they may be anything."""
        return cls(jnp.sum(jnp.where(weights != 0, weights * values, 0.0)), jnp.sum(weights))

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)

    def empty(self) -> "Mean":
        return Mean(jnp.zeros((), self.sum.dtype), jnp.zeros((), self.count.dtype))  # pyright: ignore[reportAttributeAccessIssue]

    def value(self) -> float | None:
        return _finite(float(self.sum) / float(self.count)) if float(self.count) else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """The largest value."""

    max: Scalar

    @classmethod
    def of(cls, values: Float[Array, "..."], mask: Bool[Array, "..."]) -> "Max":
        return cls(jnp.max(jnp.where(mask, values, -jnp.inf)))

    def merge(self, other: "Max") -> "Max":
        if isinstance(self.max, jax.Array):
            return Max(jnp.maximum(self.max, other.max))
        return Max(max(self.max, other.max))  # on the host: no device for two numbers

    def empty(self) -> "Max":
        return Max(jnp.full((), -jnp.inf, self.max.dtype))  # pyright: ignore[reportAttributeAccessIssue]

    def value(self) -> float | None:
        return _finite(self.max)


def merge(parts: Iterable[Mapping[str, Statistic]]) -> Stats:
    """Of all parts together; each has the same names."""
    whole: Stats = {}
    for part in parts:
        whole = {name: whole[name].merge(s) if whole else s for name, s in part.items()}
    return whole


def empty(shapes: Mapping[str, S]) -> dict[str, S]:
    """Where merging begins, from statistics of any values (`jax.eval_shape` will do)."""
    return {name: statistic.empty() for name, statistic in shapes.items()}


def on_host(stats: Stats) -> Stats:
    """The same with Python's numbers, as `to_json` and `merge` on the host take them."""
    return jax.tree.map(float, jax.device_get(stats))


def values(stats: Mapping[str, Statistic]) -> dict[str, float | None]:
    """Name -> the figure that is recorded."""
    return {name: statistic.value() for name, statistic in stats.items()}


KINDS = {kind.__name__: kind for kind in (Sum, Mean, Max)}


def to_json(stats: Mapping[str, Statistic]) -> dict[str, list[Any]]:
    """For a checkpoint; floats come back to the bit."""
    return {name: [type(s).__name__, *dataclasses.astuple(s)] for name, s in stats.items()}  # pyright: ignore[reportArgumentType]


def from_json(stored: Mapping[str, list[Any]]) -> Stats:
    return {name: KINDS[kind](*fields) for name, (kind, *fields) in stored.items()}


def _finite(value: Scalar) -> float | None:
    """JSON has no NaN and no infinity; what has none says nothing anyway."""
    return float(value) if math.isfinite(float(value)) else None
