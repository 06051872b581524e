"""What the engine asks of whatever runs the model."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from m1jax.inference.capacity import Capacity
from m1jax.inference.scheduler import Chunk, Copy
from m1jax.inference.sequence import Sequence

A = TypeVar("A", np.ndarray, jax.Array)


class Decoded(NamedTuple, Generic[A]):
    """What decode steps wrote, one row for each sequence; beyond its count a row means nothing."""

    counts: A
    """int32 [n]"""
    tokens: A
    """int32 [n, steps]"""
    logp: A
    """float32 [n, steps]"""
    nucleus_logp: A
    """float32 [n, steps]"""
    reasons: A
    """int32 [n], places in `stopping.REASONS`"""
    certain: A
    """int32 [n], `Sequence.certain` from now on"""
    routes: A | None
    """uint8 [n, steps, layers, k]"""
    top_tokens: A | None = None
    """int32 [n, steps, top], the likeliest ones; zeros where no sequence asks for them"""
    top_logp: A | None = None
    """float32 [n, steps, top]"""


class Call(Protocol):
    """Decode steps that are on their way."""

    def result(self) -> Decoded[np.ndarray]:
        """What they wrote, once they have; asked once."""
        ...


class Runner(Protocol):
    """The model on its device. Rows and slots, pages and lengths are the sequences' own."""

    capacity: Capacity
    vocab_size: int
    records_routes: bool
    top: int
    """how many of the likeliest tokens it can tell"""
    constrains: bool
    """whether sequences may have a `matcher`"""

    @property
    def guides_ahead(self) -> bool:
        """Whether such may be in a call that is started after one whose result nobody has seen."""
        ...

    def copy(self, copies: Several[Copy]) -> None:
        """Copy states and pages, one after the other."""
        ...

    def prefill(self, shape: tuple[int, int], chunks: Several[Chunk]) -> list[UInt8[np.ndarray, "n layers k"]]:
        """Let the model read the chunks' tokens. Returns their routes, where they are recorded."""
        ...

    def decode(
        self, sequences: Several[Sequence], allowances: Several[int], steps: int, patience: int, after: Call | None
    ) -> Call:
        """Feed each sequence its last token and draw the next, up to so many times, at most `steps`; and no further
        once `patience` of them have ended or written what they may. `steps` is one or the capacity's.

        after: a call whose result nobody has seen: sequences that it has too go on from where it leaves them, those
            that end in it write nothing, and their allowances are of both calls together. Where one has a matcher, none
            is new.
        """
        ...

    def load(self, params: nnx.State) -> int:
        """Take other weights, as `nnx.split(model)` gives them, wherever they lie. Returns when they are in place: the
        bytes that all devices together took over from others."""
        ...

    def rest(self) -> None:
        """Give memory back until weights are loaded again; states and pages are lost."""
        ...
