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
        return float(self.sum)


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
        return float(self.sum) / float(self.count) if float(self.count) else None


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
        return None if float(self.max) == -math.inf else float(self.max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Effective:
    """Effective share of a weighted sample, `(sum r)^2 / (n sum r^2)` (Kish): 1 where all weights r are equal."""

    sum: Scalar
    squares: Scalar
    count: Scalar

    @classmethod
    def of(cls, weights: Float[Array, "..."], mask: Bool[Array, "..."]) -> "Effective":
        weights = jnp.where(mask, weights, 0.0)
        return cls(jnp.sum(weights), jnp.sum(weights**2), jnp.sum(mask, dtype=jnp.float32))

    def merge(self, other: "Effective") -> "Effective":
        return Effective(self.sum + other.sum, self.squares + other.squares, self.count + other.count)

    def empty(self) -> "Effective":
        return Effective(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    def value(self) -> float | None:
        squares = float(self.count) * float(self.squares)
        return float(self.sum) ** 2 / squares if squares else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Correlation:
    """Pearson's, of pairs: their number, both means, and sums of squares and products about the means."""

    count: Scalar
    mean_x: Scalar
    mean_y: Scalar
    xx: Scalar
    yy: Scalar
    xy: Scalar

    @classmethod
    def of(cls, x: Float[Array, "..."], y: Float[Array, "..."], mask: Bool[Array, "..."]) -> "Correlation":
        count = jnp.sum(mask, dtype=jnp.float32)

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(count, 1.0)

        mean_x, mean_y = mean(x), mean(y)
        dx, dy = jnp.where(mask, x - mean_x, 0.0), jnp.where(mask, y - mean_y, 0.0)
        return cls(count, mean_x, mean_y, jnp.sum(dx * dx), jnp.sum(dy * dy), jnp.sum(dx * dy))

    def merge(self, other: "Correlation") -> "Correlation":
        """By Chan, Golub and LeVeque (1979): nothing large cancels."""
        count = self.count + other.count
        share = other.count / (jnp.maximum(count, 1.0) if isinstance(count, jax.Array) else max(count, 1.0))
        dx, dy, pairs = other.mean_x - self.mean_x, other.mean_y - self.mean_y, self.count * share
        return Correlation(
            count,
            self.mean_x + dx * share,
            self.mean_y + dy * share,
            self.xx + other.xx + dx * dx * pairs,
            self.yy + other.yy + dy * dy * pairs,
            self.xy + other.xy + dx * dy * pairs,
        )

    def empty(self) -> "Correlation":
        return Correlation(*(jnp.zeros((), jnp.float32) for _ in range(6)))

    def value(self) -> float | None:
        product = float(self.xx) * float(self.yy)
        return float(self.xy) / math.sqrt(product) if product > 0 else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many values lie in each of equally wide bins between two bounds; what is beyond them, in the outermost."""

    counts: Any
    low: float = dataclasses.field(metadata={"static": True})
    high: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, values: Float[Array, "..."], mask: Bool[Array, "..."], *, low: float, high: float, bins: int
    ) -> "Histogram":
        place = jnp.clip(jnp.floor((values - low) / (high - low) * bins), 0, bins - 1)
        place = jnp.where(mask, place, bins).astype(jnp.int32).ravel()
        counts = jnp.zeros(bins + 1, jnp.float32).at[place].add(1.0)[:bins]
        return cls(counts, low, high)

    def merge(self, other: "Histogram") -> "Histogram":
        if isinstance(self.counts, list):
            return Histogram([a + b for a, b in zip(self.counts, other.counts)], self.low, self.high)
        return Histogram(self.counts + other.counts, self.low, self.high)

    def empty(self) -> "Histogram":
        return Histogram(jnp.zeros(self.counts.shape, jnp.float32), self.low, self.high)

    def quantile(self, share: float) -> float | None:
        """The value below which that share of all lies, to the width of a bin."""
        counts = np.asarray(self.counts)
        if not counts.sum():
            return None
        reached = np.cumsum(counts)
        place = min(int(np.searchsorted(reached, share * reached[-1])), len(counts) - 1)
        within = (share * reached[-1] - (reached[place] - counts[place])) / max(counts[place], 1.0)
        return self.low + float(place + within) * (self.high - self.low) / len(counts)

    def value(self) -> float | None:
        """The median."""
        return self.quantile(0.5)


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
    return jax.tree.map(lambda x: np.asarray(x).tolist(), jax.device_get(stats))


def values(stats: Mapping[str, Statistic]) -> dict[str, float | None]:
    """Name -> the figure that is recorded."""
    return {name: statistic.value() for name, statistic in stats.items()}


KINDS = {kind.__name__: kind for kind in (Sum, Mean, Max, Effective, Correlation, Histogram)}


def to_json(stats: Mapping[str, Statistic]) -> dict[str, list[Any]]:
    """For a checkpoint; floats come back to the bit."""
    return {name: [type(s).__name__, *dataclasses.astuple(s)] for name, s in stats.items()}  # pyright: ignore[reportArgumentType]


def from_json(stored: Mapping[str, list[Any]]) -> Stats:
    return {name: KINDS[kind](*fields) for name, (kind, *fields) in stored.items()}
