"""One token from the logits of each row: temperature, nucleus, a key per request."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from m1jax.model import parallel
from m1jax.sharding import ambient_mesh
from pallas_kernels import target_platform


class Drawn(NamedTuple):
    """One token per row."""

    tokens: Int[Array, " rows"]
    logp: Float[Array, " rows"]
    """under the tempered distribution *before* the nucleus cut (at temperature 0: at temperature 1), that is, of the
    policy that `MiniMaxM1.log_probs` computes in training"""
    nucleus_logp: Float[Array, " rows"]
    """after the cut, and among the allowed tokens; equal to logp where all are allowed and nothing was cut"""
    top_tokens: Int[Array, "rows top"] | None = None
    """the likeliest ones"""
    top_logp: Float[Array, "rows top"] | None = None
    """what logp would be of them"""


def sample(
    logits: Float[Array, "rows vocab"],
    keys: Key[Array, " rows"],
    *,
    temperature: Float[Array, " rows"],
    top_p: Float[Array, " rows"],
    allowed: UInt32[Array, "rows words"] | None = None,
    top: int = 0,
    wants_top: Bool[Array, ""] | bool = True,
    cuts: bool | None = None,
) -> Drawn:
    """Draw one token per row.

    Each row uses one uniform number from its own key (inversion of the cumulative distribution), so its token depends
    neither on the other rows nor on their number.

    Args:
        logits: [N, V] float32.
        keys: [N] typed keys, fresh for every token.
        temperature: [N], divides the logits; 0 takes the most probable token.
        top_p: [N], draw from the smallest set of most probable tokens whose probabilities sum to at least top_p
            (Holtzman et al., 2020); 1: from all. Rows that cut nothing spare the search for the set if all do.
        allowed: draw from these ids only (see `unpacked`).
        top: how many of the likeliest tokens to return; zeros unless `wants_top`.
        cuts: whether there is a row whose top_p is below 1; None: not known beforehand.
    """
    some = functools.partial(_sample, top=top, cuts=cuts)
    return parallel.by_row(some, logits, keys, temperature, top_p, allowed, wants_top)


def _sample(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    allowed: jax.Array | None,
    wants_top: jax.Array | bool,
    top: int,
    cuts: bool | None,
) -> Drawn:
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    log_probs = jax.nn.log_softmax(scaled, axis=-1)
    drawn_from, best = log_probs, logits
    if allowed is not None:
        free = unpacked(allowed, logits.shape[-1])
        drawn_from, best = (
            jax.nn.log_softmax(jnp.where(free, scaled, -jnp.inf), axis=-1),
            jnp.where(free, logits, -jnp.inf),
        )
    probs = jnp.exp(drawn_from)
    cut = ~greedy & (top_p < 1)
    everything = Nucleus.everything(len(logits))

    def smaller() -> Nucleus:
        # Behind a barrier, without which XLA searches always and chooses afterwards.
        return _where(cut, _nucleus(jax.lax.optimization_barrier(probs), top_p), everything)

    if cuts is None:
        nucleus = jax.lax.cond(jnp.any(cut), smaller, lambda: everything)
    else:
        nucleus = smaller() if cuts else everything
    drawn = jnp.where(greedy, jnp.argmax(best, axis=-1), _invert(probs, nucleus, jax.vmap(jax.random.uniform)(keys)))
    tokens = drawn.astype(jnp.int32)
    logp, drawn_logp = (jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0] for x in (log_probs, drawn_from))
    likeliest = (None, None)
    if top:
        shape = (len(logits), top)
        likeliest = jax.lax.cond(
            wants_top, lambda: _top(log_probs, top), lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
        )
    return Drawn(tokens, logp, drawn_logp - jnp.log(nucleus.mass), *likeliest)


ALL = np.uint32(0xFFFFFFFF)
"""A word of `allowed` that forbids nothing."""


def unpacked(allowed: UInt32[Array, "rows words"], vocab: int) -> Bool[Array, "rows vocab"]:
    """Which ids are allowed: id i is bit i % 32 of word i // 32."""
    bits = jnp.arange(vocab, dtype=jnp.uint32) % 32
    return (jnp.repeat(allowed, 32, axis=-1)[:, :vocab] >> bits) & 1 == 1


def _top(log_probs: Float[Array, "rows vocab"], top: int) -> tuple[jax.Array, jax.Array]:
    logp, tokens = jax.lax.top_k(log_probs, top)
    return tokens.astype(jnp.int32), logp


class Nucleus(NamedTuple):
    """The smallest set of most probable tokens that has top_p; of equally probable ones the first."""

    least: Float[Array, " rows"]
    """the probability of the least probable of them"""
    above: Float[Array, " rows"]
    """of those that are more probable together"""
    ties: Float[Array, " rows"]
    """how many have the least"""

    @property
    def mass(self) -> Float[Array, " rows"]:
        return self.above + self.ties * self.least

    @classmethod
    def everything(cls, rows: int) -> "Nucleus":
        """Where nothing is cut: all are more probable than nothing."""
        return cls(jnp.full(rows, -1.0), jnp.ones(rows), jnp.zeros(rows))


def _where(condition: Bool[Array, " rows"], a: Nucleus, b: Nucleus) -> Nucleus:
    return Nucleus(*(jnp.where(condition, x, y) for x, y in zip(a, b)))


def _invert(probs: Float[Array, "rows vocab"], nucleus: Nucleus, u: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The first token at which the cumulative probability of the nucleus exceeds u times the whole: those above the
    least by their ids, then the others by theirs. Never one of probability zero."""
    least, above, ties = nucleus
    point = u * nucleus.mass
    last = point >= above  # among the least probable, which are counted instead of summed
    floor = least[:, None]
    weights = jnp.where(last[:, None], probs == floor, jnp.where(probs > floor, probs, 0.0))
    cumulative = jnp.cumsum(weights, axis=-1)
    within = jnp.minimum(point / above, ONE_LESS) * cumulative[:, -1]  # the sums round differently
    skipped = jnp.clip(jnp.floor((point - above) / least), 0, ties - 1)
    return jnp.argmax(cumulative > jnp.where(last, skipped, within)[:, None], axis=-1)


ONE_LESS = 1 - 2.0**-23
"""times a float is less than that float"""


def _nucleus(probs: Float[Array, "rows vocab"], top_p: Float[Array, " rows"]) -> Nucleus:
    if target_platform() == "cpu" and ambient_mesh() is None:  # whose cache holds a row, but not all of them
        return jax.lax.map(lambda row: _nucleus_of_row(*row), (probs, top_p))
    return jax.vmap(_nucleus_of_row)(probs, top_p)


def _nucleus_of_row(probs: Float[Array, " vocab"], top_p: Float[Array, ""]) -> Nucleus:
    """As if sorted, but by search among the bits of the least probability: floats that are not negative are ordered as
    their bits are, and sorting takes several times as long. A CPU takes a bit at a time, a GPU, which takes longer to
    start a sum than to sum, several."""
    bits, unroll = (GPU_BITS, True) if target_platform() == "gpu" else (1, False)
    blocks = jnp.pad(probs, (0, -len(probs) % BLOCKS)).reshape(BLOCKS, -1)

    def cumulative(values: list[jax.Array]) -> Float[Array, " values"]:
        """What has at least each of these probabilities: one reading of them serves all."""
        least = [jax.lax.bitcast_convert_type(value, jnp.float32) for value in values]
        return jnp.sum(jnp.stack([jnp.sum(jnp.where(blocks >= x, blocks, 0.0), axis=-1) for x in least]), axis=-1)

    def narrow(place: int | jax.Array, low: jax.Array) -> jax.Array:
        """The highest of 2**bits values, from `low` on, at which there is enough."""
        width = jnp.left_shift(1, SEARCHED - bits * (place + 1))
        steps = [low + i * width for i in range(1, 2**bits)]
        return low + width * jnp.sum(cumulative(steps) >= top_p)

    low = jax.lax.fori_loop(0, SEARCHED // bits, narrow, jnp.int32(SMALLEST), unroll=unroll)
    least = jax.lax.bitcast_convert_type(low, jnp.float32)
    # Where all together are not enough, by a rounding of their sum, the least of them.
    least = jnp.min(jnp.where(probs >= least, probs, jnp.inf))
    above = jnp.sum(jnp.where(probs > least, probs, 0.0))
    ties = jnp.sum(probs == least).astype(jnp.float32)
    return Nucleus(least, above, jnp.clip(jnp.ceil((top_p - above) / least), 1, ties))


GPU_BITS = 3
"""Found by one reading of the probabilities."""
BLOCKS = 128
"""Parts of the vocabulary that are summed side by side."""
SMALLEST = 0x00800000
"""The bits of the smallest normal number."""
SEARCHED = 30
"""Bits that are searched: those of 1 are less than 2**30 above."""
