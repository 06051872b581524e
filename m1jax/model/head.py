"""From hidden states to words: float32 logits, and log-probabilities without ever holding [batch, time, vocab].

The report (arXiv 2506.13585, section 3.2, figure 3) needs float32 here for sampler and trainer to agree. A product of
float32 arrays does not run on the matrix units of a GPU or TPU, but bfloat16 hidden states need no more than one 16-bit
number each, and a float32 weight is a sum of few: their products are summed in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1jax.model import parallel
from m1jax.model.layers import apart, linear
from pallas_kernels import target_platform
from pallas_kernels._compat import vary_over, varying_axes

CHUNK_ELEMENTS = 2**26  # logits alive at once in log_probs: 256 MiB of float32, whatever time and vocabulary are
WIDE_CHUNK_ELEMENTS = 2**27  # the same on matrix units: the gradient of lm_head is read and written once per chunk
WEIGHT_SCALE = 2.0**10  # float16 then holds weights up to 64, and of what is left of them all above 2^-35
GRADIENT_SCALE = 2.0**15  # likewise for what is at most 1


def logits(hidden: Float[Array, "... hidden"], lm_head: Float[Array, "vocab hidden"]) -> Float[Array, "... vocab"]:
    """Float32 logits. Bfloat16 hidden states are taken for exact."""
    if _on_matrix_units(hidden):
        return _product(hidden, _parts(lm_head))
    return linear(hidden.astype(jnp.float32), lm_head.astype(jnp.float32), precision="highest")


def log_probs(
    hidden: Float[Array, "batch time hidden"],
    lm_head: Float[Array, "vocab hidden"],
    targets: Int[Array, "batch time"],
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """Log-probability of each target and entropy of its distribution, in nats, float32.

    Works through the tokens in chunks whose logits are recomputed for the gradient, so that memory does not grow with
    time x vocabulary (80k tokens x 200,064 words would be 64 GB). On matrix units the values are as accurate as float32
    products, the gradients as bfloat16 ones. The temperature's gradient is zero.
    """
    return parallel.log_probs(_log_probs, hidden, lm_head, targets, jax.lax.stop_gradient(temperature))


def _log_probs(
    hidden: Float[Array, "batch time hidden"],
    lm_head: Float[Array, "part_of_vocab hidden"],
    targets: Int[Array, "batch time"],
    temperature: float | Float[Array, ""],
    vocab_axis: str | None,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """The same, where the words may be spread over a mesh axis: each device has its part of ``lm_head``."""
    if _on_matrix_units(hidden):
        # Marked so, JAX sums its gradient over the devices that share it.
        lm_head = vary_over(lm_head, varying_axes(hidden, targets))
        tokens = hidden.reshape(-1, hidden.shape[-1]), lm_head, targets.ravel(), temperature
        log_prob, entropy = cast(tuple[jax.Array, jax.Array], _matrix_units(vocab_axis, *tokens))
        return log_prob.reshape(targets.shape), entropy.reshape(targets.shape)
    batch, time, _ = hidden.shape
    chunk = min(time, max(1, CHUNK_ELEMENTS // (batch * lm_head.shape[0])))
    padded = -(-time // chunk) * chunk

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padded - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, padded // chunk, chunk, *x.shape[2:]), 1, 0)

    def one(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen, normaliser, mean = _statistics(logits(hidden, lm_head) / temperature, targets, vocab_axis)
        return chosen - normaliser, normaliser - mean

    if chunk == time:  # one chunk: its logits may stay
        return one(hidden, targets)
    one = jax.checkpoint(one)
    _, parts = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (chunks(hidden), chunks(targets)))
    log_prob, entropy = (jnp.moveaxis(part, 0, 1).reshape(batch, padded)[:, :time] for part in parts)
    return log_prob, entropy


def _statistics(
    scores: Float[Array, "... part_of_vocab"], targets: Int[Array, "..."], vocab_axis: str | None
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Of each token's distribution over all words: the target's score, log sum exp, and the mean score."""
    top = apart(jax.lax.stop_gradient(jnp.max(scores, axis=-1)))
    if vocab_axis is not None:
        top = jax.lax.pmax(top, vocab_axis)
    weights = jnp.exp(scores - top[..., None])
    mass = _over_words(jnp.sum(weights, axis=-1), vocab_axis)
    mean = _over_words(jnp.sum(weights * scores, axis=-1), vocab_axis) / mass
    index, here = _place(targets, scores.shape[-1], vocab_axis)
    chosen = jnp.take_along_axis(scores, jnp.where(here, index, 0)[..., None], axis=-1)[..., 0]
    return _over_words(jnp.where(here, chosen, 0.0), vocab_axis), top + jnp.log(mass), mean


def _place(targets: jax.Array, words: int, vocab_axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Each target's row in this device's part of the vocabulary, and whether it lies there."""
    index = targets if vocab_axis is None else targets - jax.lax.axis_index(vocab_axis) * words
    return index, (index >= 0) & (index < words)


def _over_words(x: jax.Array, vocab_axis: str | None) -> jax.Array:
    return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)


def _on_matrix_units(hidden: jax.Array) -> bool:
    return hidden.dtype == jnp.bfloat16 and target_platform() != "cpu"


def _parts(weight: Float[Array, "vocab hidden"]) -> list[Array]:
    """16-bit arrays [vocab, hidden] whose sum is the weight times WEIGHT_SCALE, the largest first.

    Two of float16 on GPUs: 2^-22 of the weight is lost, and it must be below 64. Three of bfloat16 on TPUs, whose
    matrix units take nothing else.
    """
    dtype, count = (jnp.float16, 2) if target_platform() == "gpu" else (jnp.bfloat16, 3)
    rest, parts = weight.astype(jnp.float32) * WEIGHT_SCALE, []
    for _ in range(count):
        # A mere cast there and back counts as exact to XLA, which would find the rest to be zero.
        part = jax.lax.reduce_precision(rest, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
        rest = rest - part
        parts.append(part.astype(dtype))
    return parts


def _product(hidden: Float[Array, "... hidden"], parts: Sequence[Array]) -> Float[Array, "... vocab"]:
    """hidden times the sum of a weight's parts, in float32: one product, the smallest parts summed first."""
    repeated = jnp.concatenate([hidden.astype(parts[0].dtype)] * len(parts), axis=-1)
    return _dot("...i,vi->...v", repeated, jnp.concatenate(parts[::-1], axis=-1)) / WEIGHT_SCALE


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matrix_units(
    vocab_axis: str | None,
    hidden: Float[Array, "tokens hidden"],
    lm_head: Float[Array, "part_of_vocab hidden"],
    targets: Int[Array, " tokens"],
    temperature: float | Float[Array, ""],
) -> tuple[Float[Array, " tokens"], Float[Array, " tokens"]]:
    """(log-probability, entropy) of bfloat16 hidden states."""
    return _forward(vocab_axis, hidden, lm_head, targets, temperature)[0]


def _forward(vocab_axis, hidden, lm_head, targets, temperature):
    parts = _parts(lm_head)

    def one(hidden, targets):
        return _statistics(_product(hidden, parts) / temperature, targets, vocab_axis)

    chunks = _Chunks(len(targets), lm_head.shape[0])
    chosen, normaliser, mean = chunks.join(jax.lax.map(lambda xs: one(*xs), chunks.split(hidden, targets)))
    entropy = normaliser - mean
    return (chosen - normaliser, entropy), (hidden, lm_head, targets, temperature, normaliser, entropy)


def _backward(vocab_axis, saved, cotangents):
    """d score_v = [v is the target] g - p_v (g + e (log p_v + entropy)), g and e being the gradients of the results.

    Probabilities are recomputed from the exact normaliser and one product (on TPUs two) of 16-bit numbers. Gradients
    may be smaller than any float16: each token's are taken in a unit that none of its exceeds (no vocabulary has an
    entropy of 15), and the units relative to the largest. Without gradients there is no unit.
    """
    hidden, lm_head, targets, temperature, normaliser, entropy = saved
    g, e = cotangents
    words = lm_head.shape[0]
    parts = _parts(lm_head)
    leading = parts[: len(parts) - 1]
    unit = jnp.abs(g) + 16 * jnp.abs(e)
    largest = jnp.maximum(jnp.max(unit), 1e-30)
    to_units = jnp.where(unit > 1e-30, GRADIENT_SCALE / unit, 0.0)

    def one(d_lm_head, chunk):
        hidden, targets, normaliser, entropy, g, e, unit, to_units = chunk
        index, _ = _place(targets, words, vocab_axis)
        log_p = _product(hidden, leading) / temperature - normaliser[:, None]
        d_scores = -jnp.exp(log_p) * (g[:, None] + e[:, None] * (log_p + entropy[:, None]))
        d_scores += jnp.where(jnp.arange(words) == index[:, None], g[:, None], 0.0)
        d_scores = (d_scores * to_units[:, None]).astype(leading[0].dtype)
        d_hidden = _over_words(_dot("tv,vi->ti", d_scores, leading[0]), vocab_axis)
        d_hidden *= (unit / (GRADIENT_SCALE * WEIGHT_SCALE * temperature))[:, None]
        weighted = (hidden * (unit / largest)[:, None]).astype(leading[0].dtype)
        return d_lm_head + _dot("tv,ti->vi", d_scores, weighted), d_hidden.astype(hidden.dtype)

    chunks = _Chunks(len(targets), words)
    start = vary_over(jnp.zeros(lm_head.shape, jnp.float32), varying_axes(lm_head, g, e))
    tokens = (hidden, targets, normaliser, entropy, g, e, unit, to_units)
    d_lm_head, d_hidden = jax.lax.scan(one, start, chunks.split(*tokens))
    d_lm_head = d_lm_head * (largest / (GRADIENT_SCALE * temperature))
    return chunks.join(d_hidden), d_lm_head.astype(lm_head.dtype), None, None


_matrix_units.defvjp(_forward, _backward)


class _Chunks:
    """How so many tokens are cut into chunks of equal size, none with more logits than may live at once."""

    def __init__(self, tokens: int, words: int) -> None:
        self.tokens = tokens
        self.count = -(-tokens // max(1, WIDE_CHUNK_ELEMENTS // words))
        size = -(-tokens // self.count)
        self.size = size if self.count == 1 else -(-size // 8) * 8

    def split(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """[tokens, ...] -> [chunks, size, ...], zeros behind."""
        missing = self.count * self.size - self.tokens
        padded = (jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)
        return tuple(x.reshape(self.count, self.size, *x.shape[1:]) for x in padded)

    def join(self, arrays):
        """The inverse, of every array of a tree."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: self.tokens], arrays)
