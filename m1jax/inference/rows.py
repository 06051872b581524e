"""What the host tells the device of each row, and hears from it: one array each way, because arrays travel singly.

The views are numpy's on the host, where they are filled, and JAX's in the programs, where they are read. Floats and
keys travel as the integers that have their bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Several
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from m1jax.inference.capacity import Capacity
from m1jax.inference.device import Decoded
from m1jax.inference.scheduler import Chunk
from m1jax.inference.sequence import Sequence
from m1jax.inference.stopping import END_IDS, NEVER

A = TypeVar("A", np.ndarray, jax.Array)


class Rows(NamedTuple, Generic[A]):
    """What the decode program must know of each row. Each is [rows] or [rows, ...], int32 where nothing else is
    said."""

    tokens: A
    lengths: A
    """tokens that states and keys have seen"""
    allowances: A
    """tokens to write at most; 0: the row is at rest"""
    numbers: A
    """of the next token in its completion"""
    samples: A
    slots: A
    """of its states"""
    patience: A
    """this, `run`, `certain` and `end_ids` are those of `Stops`"""
    run: A
    temperature: A
    """float32"""
    top_p: A
    """float32"""
    certain: A
    """float32"""
    follows: A
    """the row in the call before that this one goes on from, whose result the host has not seen: tokens, lengths,
    numbers and run are as before that call, allowances of both together; -1: none"""
    asks: A
    """whether the host says what it may draw"""
    message: A
    """the number of the call's first, if a row asks; the same in all rows"""
    keys: A
    """[rows, words] uint32"""
    end_ids: A
    """[rows, END_IDS]"""
    pages: A
    """[rows, pages]; -1: none"""

    @classmethod
    def of(cls, packed: A) -> Rows[A]:
        """The columns of an int32 array [rows, width]."""
        tokens, lengths, allowances, numbers, samples, slots, patience, run, *others = (packed[:, i] for i in range(11))
        follows, asks, message = others
        temperature, top_p, certain = (packed[:, i].view(np.float32) for i in range(11, SCALARS))
        first, second, third = np.cumsum([SCALARS, _key_words(), END_IDS])
        return Rows(
            tokens=tokens,
            lengths=lengths,
            allowances=allowances,
            numbers=numbers,
            samples=samples,
            slots=slots,
            patience=patience,
            run=run,
            temperature=temperature,
            top_p=top_p,
            certain=certain,
            follows=follows,
            asks=asks,
            message=message,
            keys=packed[:, first:second].view(np.uint32),
            end_ids=packed[:, second:third],
            pages=packed[:, third:],
        )

    @classmethod
    def at_rest(cls, rows: int, capacity: Capacity) -> Int32[np.ndarray, "rows width"]:
        """Rows that have nothing to write."""
        pages = capacity.pages_for(capacity.max_length)
        packed = np.zeros((rows, SCALARS + _key_words() + END_IDS + pages), np.int32)
        view = Rows.of(packed)
        view.temperature[:] = view.top_p[:] = view.certain[:] = 1.0
        view.slots[:] = view.follows[:] = view.end_ids[:] = view.pages[:] = -1
        return packed

    def going_on(self: Rows[jax.Array], before: Last[jax.Array], steps: Int[Array, ""]) -> Rows[jax.Array]:
        """With what the call before has written, in a program."""
        follows = self.follows >= 0
        token, count, reason, certain = (jnp.where(follows, x[self.follows], 0) for x in before)
        left = jnp.where(reason == 0, self.allowances - count, 0)
        return self._replace(
            tokens=jnp.where(count > 0, token, self.tokens),
            lengths=self.lengths + count,
            numbers=self.numbers + count,
            run=jnp.where(follows, certain, self.run),
            allowances=jnp.minimum(left, steps),
        )


SCALARS = 14
"""Columns that hold one number."""


class Last(NamedTuple, Generic[A]):
    """What the call after must know of a decode call, each int32 [rows of the largest program]."""

    tokens: A
    """the last that was written, if any was"""
    counts: A
    reasons: A
    certain: A

    @classmethod
    def nothing(cls, rows: int) -> Last[jax.Array]:
        return Last(*jnp.zeros((4, rows), jnp.int32))

    @classmethod
    def of(cls, out: Decoded[jax.Array], rows: int) -> Last[jax.Array]:
        last = jnp.take_along_axis(out.tokens, jnp.maximum(out.counts - 1, 0)[:, None], axis=1)[:, 0]
        fields = (last, out.counts, out.reasons, out.certain)
        return Last(*(jnp.pad(x, (0, rows - len(x))) for x in fields))


def _key_words() -> int:
    """Words of a raw key, by JAX's configuration."""
    return _words(jax.config.values["jax_default_prng_impl"])


@functools.cache  # tracing takes longer than all that a call needs besides
def _words(implementation: str) -> int:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=implementation))).shape[-1]


def settle(rows: Rows[np.ndarray], sequence: Sequence) -> None:
    """Write down what stays as it is while a sequence has its row and its pages."""
    row, sampling, stop = sequence.row, sequence.request.sampling, sequence.request.sampling.repetition_stop
    rows.keys[row], rows.samples[row], rows.slots[row] = sequence.key, sequence.sample, sequence.slot
    rows.temperature[row], rows.top_p[row] = sampling.temperature, sampling.top_p
    rows.end_ids[row] = -1
    rows.end_ids[row, : len(sampling.end_ids)] = sampling.end_ids
    rows.certain[row] = 0.0 if stop is None else np.log(np.maximum(stop.probability, 1e-30))
    rows.patience[row] = NEVER if stop is None else stop.tokens
    rows.pages[row] = -1
    rows.pages[row, : len(sequence.pages)] = sequence.pages


def advance(rows: Rows[np.ndarray], sequences: Several[Sequence], allowances: Several[int]) -> None:
    """Write down what every decode step changes."""
    at = [sequence.row for sequence in sequences]
    rows.tokens[at] = [sequence.tokens[-1] for sequence in sequences]
    rows.lengths[at] = [sequence.computed for sequence in sequences]
    rows.numbers[at] = [sequence.new for sequence in sequences]
    rows.run[at] = [sequence.certain for sequence in sequences]
    rows.allowances[at] = allowances


class Prompts(NamedTuple, Generic[A]):
    """What the prefill program must know of each row, likewise."""

    counts: A
    """of the row's tokens that are real"""
    lengths: A
    slots: A
    tokens: A
    """[rows, time]"""
    pages: A

    @classmethod
    def of(cls, packed: A, time: int) -> Prompts[A]:
        """The columns of an int32 array [rows, width]."""
        return Prompts(packed[:, 0], packed[:, 1], packed[:, 2], packed[:, 3 : 3 + time], packed[:, 3 + time :])

    @classmethod
    def packed(
        cls, shape: tuple[int, int], chunks: Several[Chunk], places: Several[int], capacity: Capacity
    ) -> Int32[np.ndarray, "rows width"]:
        """These chunks in these rows; the others have nothing to read."""
        rows, time = shape
        packed = np.zeros((rows, 3 + time + capacity.pages_for(capacity.max_length)), np.int32)
        view = Prompts.of(packed, time)
        view.slots[:] = view.pages[:] = -1
        for chunk, i in zip(chunks, places):
            sequence, start = chunk.sequence, chunk.sequence.computed
            view.counts[i], view.lengths[i], view.slots[i] = chunk.count, start, sequence.slot
            view.tokens[i, : chunk.count] = sequence.tokens[start : start + chunk.count]
            view.pages[i, : len(sequence.pages)] = sequence.pages
        return packed


def pack_decoded(out: Decoded[jax.Array]) -> Int32[Array, "rows width"]:
    """What every row has; routes and the likeliest tokens are not among it."""
    columns = [out.counts, out.reasons, out.certain]
    wide = [out.tokens, out.logp.view(np.int32), out.nucleus_logp.view(np.int32)]
    return jnp.concatenate([*(column[:, None] for column in columns), *wide], axis=1)


def unpack_decoded(packed: Int32[np.ndarray, "rows width"]) -> Decoded[np.ndarray]:
    """The other way."""
    counts, reasons, certain = packed[:, :3].T
    tokens, logp, nucleus_logp = np.split(packed[:, 3:], 3, axis=1)
    return Decoded(counts, tokens, logp.view(np.float32), nucleus_logp.view(np.float32), reasons, certain, None)
