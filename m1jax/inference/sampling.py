"""One token from the logits of each row: temperature, nucleus, a key per request."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

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
        allowed: draw from these ids only (see `unpacked`); spared where every row allows all.
        top: how many of the likeliest tokens to return; zeros unless `wants_top`.
    """
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    log_probs = jax.nn.log_softmax(scaled, axis=-1)
    drawn_from, best = log_probs, logits
    if allowed is not None:
        drawn_from, best = jax.lax.cond(
            jnp.any(allowed != ALL), lambda: _restricted(scaled, logits, allowed), lambda: (log_probs, logits)
        )
    probs = jnp.exp(drawn_from)
    u = jax.vmap(jax.random.uniform)(keys)
    cut = ~greedy & (top_p < 1)
    drawn = _where_any(~greedy & ~cut, lambda: _invert(probs, u), jnp.argmax(best, axis=-1))
    drawn, mass = jax.lax.cond(
        jnp.any(cut),
        lambda: _where(cut, _nucleus(probs, top_p, u), (drawn, jnp.ones_like(u))),
        lambda: (drawn, jnp.ones_like(u)),
    )
    tokens = drawn.astype(jnp.int32)
    logp, drawn_logp = (jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0] for x in (log_probs, drawn_from))
    likeliest = (None, None)
    if top:
        shape = (len(logits), top)
        likeliest = jax.lax.cond(
            wants_top, lambda: _top(log_probs, top), lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
        )
    return Drawn(tokens, logp, drawn_logp - jnp.log(mass), *likeliest)


ALL = np.uint32(0xFFFFFFFF)
"""A word of `allowed` that forbids nothing."""


def unpacked(allowed: UInt32[Array, "rows words"], vocab: int) -> Bool[Array, "rows vocab"]:
    """Which ids are allowed: id i is bit i % 32 of word i // 32."""
    bits = jnp.arange(vocab, dtype=jnp.uint32) % 32
    return (jnp.repeat(allowed, 32, axis=-1)[:, :vocab] >> bits) & 1 == 1


def _restricted(
    scaled: Float[Array, "rows vocab"], logits: Float[Array, "rows vocab"], allowed: UInt32[Array, "rows words"]
) -> tuple[jax.Array, jax.Array]:
    """The log-probabilities among the allowed tokens, and their logits."""
    free = unpacked(allowed, logits.shape[-1])
    return jax.nn.log_softmax(jnp.where(free, scaled, -jnp.inf), axis=-1), jnp.where(free, logits, -jnp.inf)


def _top(log_probs: Float[Array, "rows vocab"], top: int) -> tuple[jax.Array, jax.Array]:
    logp, tokens = jax.lax.top_k(log_probs, top)
    return tokens.astype(jnp.int32), logp


def _where(
    condition: Bool[Array, "*rows"], a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b))


def _where_any(
    rows: Bool[Array, " rows"], compute: Callable[[], jax.Array], otherwise: Int[Array, " rows"]
) -> Int[Array, " rows"]:
    """`compute()` in these rows; spared where there are none. A GPU, which would have to wait for the host to look,
    computes it in any case."""
    if target_platform() == "gpu":
        return jnp.where(rows, compute(), otherwise)
    return jax.lax.cond(jnp.any(rows), lambda: jnp.where(rows, compute(), otherwise), lambda: otherwise)


def _invert(probs: Float[Array, "rows vocab"], u: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The first index whose cumulative probability exceeds u * total. Never one of probability zero, because u < 1."""
    cumulative = jnp.cumsum(probs, axis=-1)
    return jnp.argmax(cumulative > u[:, None] * cumulative[:, -1:], axis=-1)


def _nucleus(
    probs: Float[Array, "rows vocab"], top_p: Float[Array, " rows"], u: Float[Array, " rows"]
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """A token of the nucleus, and the nucleus' probability: inversion in the order of falling probability."""
    if target_platform() == "cpu" and ambient_mesh() is None:  # whose cache holds a row, but not all of them
        return jax.lax.map(lambda row: _nucleus_of_row(*row), (probs, top_p, u))
    return jax.vmap(_nucleus_of_row)(probs, top_p, u)


def _nucleus_of_row(
    probs: Float[Array, " vocab"], top_p: Float[Array, ""], u: Float[Array, ""]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """As if sorted (equal probabilities by index), but by bisection: sorting takes several times as long."""
    # The nucleus ends with the first rank whose cumulative probability reaches top_p ...
    least, above, ties = _value_where(probs, lambda cumulative: cumulative >= top_p)
    kept = jnp.clip(jnp.ceil((top_p - above) / least), 1, ties)  # of those as probable as the last
    mass = above + kept * least
    # ... and what is drawn is the first rank whose cumulative probability exceeds u times that of the nucleus.
    value, above, ties = _value_where(probs, lambda cumulative: cumulative > u * mass)
    outside = value < least  # by a rounding of the sums
    value, above, ties = _where(outside, (least, mass - least, kept), (value, above, ties))
    skipped = jnp.clip(jnp.floor((u * mass - above) / value), 0, ties - 1)
    equal = probs == value
    if target_platform() == "gpu":
        return jnp.argmax(jnp.cumsum(equal) > skipped), mass
    # A CPU counts one after the other, and mostly there is nothing to count.
    first, later = lambda: jnp.argmax(equal), lambda: jnp.argmax(jnp.cumsum(equal) > skipped)
    return jax.lax.cond(skipped == 0, first, later), mass


GPU_BITS = 3
"""Found by one reading of the probabilities."""
BLOCKS = 128
"""Parts of the vocabulary that are summed side by side."""
SMALLEST = 0x00800000
"""The bits of the smallest normal number."""
SEARCHED = 30
"""Bits that are searched: those of 1 are less than 2**30 above."""


def _value_where(
    probs: Float[Array, " vocab"], enough: Callable[[Float[Array, " values"]], Bool[Array, " values"]]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The first probability, going down, at which the cumulative one is `enough`; what lies above it; how many tokens
    have it.

    By search among its bits: floats that are not negative are ordered as their bits are. A CPU takes a bit at a time, a
    GPU, which takes longer to start a sum than to sum, several.
    """
    bits, unroll = (GPU_BITS, True) if target_platform() == "gpu" else (1, False)
    blocks = jnp.pad(probs, (0, -len(probs) % BLOCKS)).reshape(BLOCKS, -1)

    def cumulative(values: list[jax.Array]) -> Float[Array, " values"]:
        """Of each of these values: one reading of the probabilities serves them all."""
        least = [jax.lax.bitcast_convert_type(value, jnp.float32) for value in values]
        return jnp.sum(jnp.stack([jnp.sum(jnp.where(blocks >= x, blocks, 0.0), axis=-1) for x in least]), axis=-1)

    def narrow(place: int | jax.Array, low: jax.Array) -> jax.Array:
        """The highest of 2**bits values, from `low` on, at which there is enough."""
        width = jnp.left_shift(1, SEARCHED - bits * (place + 1))
        steps = [low + i * width for i in range(1, 2**bits)]
        return low + width * jnp.sum(enough(cumulative(steps)))

    low = jax.lax.fori_loop(0, SEARCHED // bits, narrow, jnp.int32(SMALLEST), unroll=unroll)
    value = jax.lax.bitcast_convert_type(low, jnp.float32)
    # Where all together are not enough, by a rounding of their sum, the least of them.
    value = jnp.min(jnp.where(probs >= value, probs, jnp.inf))
    above = jnp.sum(jnp.where(probs > value, probs, 0.0))
    return value, above, jnp.sum(probs == value).astype(jnp.float32)
