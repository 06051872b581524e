"""What an update trains on, typed.

A batch is the same class at every stage; only the shape of its fields grows:

    [positions]                       one sequence (`packing` makes it)
    [rows, time]                      sequences packed into rows
    [micro-batches, rows, time]       an update
    [updates, micro-batches, rows, time]   all updates of a generation batch (`m1jax.rl.types.Updates`)

and on the host they are numpy arrays.

A sequence of n + 1 tokens has n positions: position i holds token i and predicts token i + 1. All fields are aligned to
the predicting position, so that `model.log_probs(hidden, targets)` needs no shift.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from pallas_kernels import PADDING

B = TypeVar("B", bound="Batch")


class Column(NamedTuple):
    """What a field of a batch holds."""

    dtype: type[np.generic]
    padding: int
    """where there is no token"""


def column(dtype: type[np.generic], padding: int = 0) -> jax.Array:
    """A field of a batch."""
    return dataclasses.field(metadata={"column": Column(dtype, padding)})


def optional_column(dtype: type[np.generic], padding: int = 0) -> jax.Array | None:
    """A field that a batch may lack (None); its values may have axes of their own behind time."""
    return dataclasses.field(default=None, metadata={"column": Column(dtype, padding)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens to be trained on."""

    tokens: Int[jax.Array, "*batch time"] = column(np.int32)
    targets: Int[jax.Array, "*batch time"] = column(np.int32)
    segment_ids: Int[jax.Array, "*batch time"] = column(np.int32, PADDING)
    """which sequence of its row a position belongs to; `PADDING`: none"""
    mask: Bool[jax.Array, "*batch time"] = column(np.bool_)
    """where the predicted token is trained on"""
    weight: Float[jax.Array, "*batch time"] = column(np.float32)
    """the loss is the sum of weight times a token's term; zero outside the mask. All normalisation is in here, once per
    update over all its micro-batches, so that they add up however the update was cut."""

    @classmethod
    def columns(cls) -> dict[str, Column]:
        """Name -> what it holds, of every field that no batch lacks."""
        required = (field for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING)
        return {field.name: field.metadata["column"] for field in required}

    @classmethod
    def of(cls, **fields: jax.typing.ArrayLike | jax.ShapeDtypeStruct) -> Self:
        """A batch on the host, or of shapes alone."""
        return cls(**fields)  # pyright: ignore[reportArgumentType]

    @classmethod
    def shapes(cls, shape: tuple[int, ...]) -> Self:
        """`jax.ShapeDtypeStruct`s, to compile for batches that do not exist."""
        return cls.of(**{name: jax.ShapeDtypeStruct(shape, kind.dtype) for name, kind in cls.columns().items()})

    @classmethod
    def padding(cls, shape: tuple[int, ...]) -> Self:
        """No token at all, as numpy arrays that may be filled."""
        return cls.of(**{name: np.full(shape, kind.padding, kind.dtype) for name, kind in cls.columns().items()})

    def emptied(self, shape: tuple[int, ...]) -> Self:
        """No token at all, likewise, with the fields that this batch has."""
        behind = self.tokens.ndim
        kinds = {field.name: field.metadata["column"] for field in dataclasses.fields(self)}
        return self.of(
            **{
                name: np.full((*shape, *values.shape[behind:]), kinds[name].padding, kinds[name].dtype)
                for name, values in self.fields().items()
            }
        )

    @property
    def positions(self) -> int:
        return self.tokens.shape[-1]

    def map(self, function: Callable[[jax.Array], jax.Array]) -> Self:
        """The same of every field."""
        return jax.tree.map(function, self)

    def fields(self) -> dict[str, jax.Array]:
        """Name -> values, of the fields that are there."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: values for name, values in named.items() if values is not None}
