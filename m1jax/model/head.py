"""From hidden states to words: float32 logits, and log-probabilities without ever holding [batch, time, vocab].

The report (arXiv 2506.13585, section 3.2, figure 3) needs float32 here for sampler and trainer to agree.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1jax.model import parallel
from m1jax.model.layers import apart, linear
from m1jax.sharding import ambient_mesh, vocabulary_is_cut
from pallas_kernels import target, vocabulary_scores, vocabulary_statistics
from pallas_kernels._compat import vary_over, varying_axes
from pallas_kernels.vocabulary.chunks import Chunks
from pallas_kernels.vocabulary.split import SCALE, dot, product, split

CHUNK_ELEMENTS = 2**26  # logits alive at once in log_probs: 256 MiB of float32, whatever time and vocabulary are
KEPT_SCORES = 2**30  # so many scores a GPU keeps for the gradient: 4 GiB, which save a third of the backward pass
GRADIENT_SCALE = 2.0**15  # what is at most 1 then fills float16, from 2^-39 on


def logits(hidden: Float[Array, "... hidden"], lm_head: Float[Array, "vocab hidden"]) -> Float[Array, "... vocab"]:
    """Float32 logits."""
    mesh = ambient_mesh()
    if mesh is None or vocabulary_is_cut(len(lm_head), mesh.shape):
        on_matrix_units = hidden.dtype == jnp.bfloat16 and target.target_platform() == "gpu"
        return parallel.over_words(_scores if on_matrix_units else _products, hidden, lm_head)
    return _products(hidden, lm_head)


def _scores(hidden: Float[Array, "... hidden"], lm_head: Float[Array, "vocab hidden"]) -> Float[Array, "... vocab"]:
    return vocabulary_scores(hidden.reshape(-1, hidden.shape[-1]), lm_head).reshape(*hidden.shape[:-1], len(lm_head))


def _products(hidden: Float[Array, "... hidden"], lm_head: Float[Array, "vocab hidden"]) -> Float[Array, "... vocab"]:
    # "highest" keeps to a GPU's CUDA cores; six bfloat16 products on its matrix units are as accurate.
    precision = "BF16_BF16_F32_X6" if target.target_platform() == "gpu" else "highest"
    return linear(hidden.astype(jnp.float32), lm_head.astype(jnp.float32), precision)


def log_probs(
    hidden: Float[Array, "batch time hidden"],
    lm_head: Float[Array, "vocab hidden"],
    targets: Int[Array, "batch time"],
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """Log-probability of each target and entropy of its distribution, in nats, float32.

    Never holds more than some 512 MiB of logits (80k tokens x 200,064 words would be 64 GB); they are recomputed for
    the gradient. Bfloat16 hidden states on a GPU or TPU go through its matrix units: values as accurate as float32
    products (weights must be below 64), gradients as bfloat16 ones. The temperature's gradient is zero.
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
    if vocab_axis is not None:  # a target's place in this device's part, where it may not lie
        targets = targets - jax.lax.axis_index(vocab_axis) * lm_head.shape[0]
    if hidden.dtype == jnp.bfloat16 and target.target_platform() != "cpu":
        # Marked so, JAX sums its gradient over the devices that share it.
        lm_head = vary_over(lm_head, varying_axes(hidden, targets))
        tokens = hidden.reshape(-1, hidden.shape[-1]), lm_head, targets.ravel(), temperature
        log_prob, entropy = cast(tuple[jax.Array, jax.Array], _on_matrix_units(vocab_axis, *tokens))
        return log_prob.reshape(targets.shape), entropy.reshape(targets.shape)
    return _float32(vocab_axis, hidden, lm_head, targets, temperature)


def _float32(
    vocab_axis: str | None,
    hidden: Float[Array, "batch time hidden"],
    lm_head: Float[Array, "part_of_vocab hidden"],
    targets: Int[Array, "batch time"],
    temperature: float | Float[Array, ""],
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """Values and gradients by float32 products, in chunks of time."""
    batch, time, _ = hidden.shape
    words = lm_head.shape[0]
    chunk = min(time, max(1, CHUNK_ELEMENTS // (batch * words)))
    padded = -(-time // chunk) * chunk

    def total(x: jax.Array) -> jax.Array:
        return _over_words(x, vocab_axis)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padded - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, padded // chunk, chunk, *x.shape[2:]), 1, 0)

    def one(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = linear(hidden.astype(jnp.float32), lm_head.astype(jnp.float32), precision="highest") / temperature
        top = apart(jax.lax.stop_gradient(jnp.max(scores, axis=-1)))
        if vocab_axis is not None:
            top = jax.lax.pmax(top, vocab_axis)
        weights = jnp.exp(scores - top[..., None])
        mass = total(jnp.sum(weights, axis=-1))
        normaliser = top + jnp.log(mass)
        mean = total(jnp.sum(weights * scores, axis=-1)) / mass
        here = (targets >= 0) & (targets < words)
        chosen = jnp.take_along_axis(scores, jnp.where(here, targets, 0)[..., None], axis=-1)[..., 0]
        chosen = total(jnp.where(here, chosen, 0.0))
        return chosen - normaliser, normaliser - mean

    if chunk == time:  # one chunk: its logits may stay
        return one(hidden, targets)
    one = jax.checkpoint(one)
    _, parts = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (chunks(hidden), chunks(targets)))
    log_prob, entropy = (jnp.moveaxis(part, 0, 1).reshape(batch, padded)[:, :time] for part in parts)
    return log_prob, entropy


def _over_words(x: jax.Array, vocab_axis: str | None) -> jax.Array:
    return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_matrix_units(
    vocab_axis: str | None,
    hidden: Float[Array, "tokens hidden"],
    lm_head: Float[Array, "part_of_vocab hidden"],
    targets: Int[Array, " tokens"],
    temperature: float | Float[Array, ""],
) -> tuple[Float[Array, " tokens"], Float[Array, " tokens"]]:
    """(log-probability, entropy) of bfloat16 hidden states."""
    return _values(vocab_axis, hidden, lm_head, targets, temperature, keep_scores=False)[0]


def _values(vocab_axis, hidden, lm_head, targets, temperature, keep_scores):
    found, scores = vocabulary_statistics(hidden, lm_head, targets, scale=1.0 / temperature, keep_scores=keep_scores)
    if vocab_axis is not None:
        found = found.together(vocab_axis)
    normaliser = found.top + jnp.log(found.mass)
    entropy = normaliser - found.weighted / found.mass
    return (found.chosen - normaliser, entropy), normaliser, scores


def _forward(vocab_axis, hidden, lm_head, targets, temperature):
    keep = target.target_platform() == "gpu" and len(targets) * lm_head.shape[0] <= KEPT_SCORES
    out, normaliser, scores = _values(vocab_axis, hidden, lm_head, targets, temperature, keep)
    return out, (hidden, lm_head, targets, temperature, normaliser, out[1], scores)


def _backward(vocab_axis, saved, cotangents):
    """d score_v = [v is the target] g - p_v (g + e (log p_v + entropy)), g and e being the gradients of the results.

    Scores that were not kept are computed again, by one product (on TPUs two) of 16-bit numbers. Gradients
    may be smaller than any float16: each token's are taken in a unit that none of its exceeds (no vocabulary has an
    entropy of 15), and the units relative to the largest. Without gradients there is no unit.
    """
    hidden, lm_head, targets, temperature, normaliser, entropy, scores = saved
    g, e = cotangents
    words = lm_head.shape[0]
    parts = split(lm_head)
    leading = parts[: len(parts) - 1]
    unit = jnp.abs(g) + 16 * jnp.abs(e)
    largest = jnp.maximum(jnp.max(unit), 1e-30)
    to_units = jnp.where(unit > 1e-30, GRADIENT_SCALE / unit, 0.0)

    def one(d_lm_head, chunk):
        (hidden, targets, normaliser, entropy, g, e, unit, to_units), scores = chunk
        scores = product(hidden, leading) / temperature if scores is None else scores
        log_p = scores - normaliser[:, None]
        d_scores = -jnp.exp(log_p) * (g[:, None] + e[:, None] * (log_p + entropy[:, None]))
        d_scores += jnp.where(jnp.arange(words) == targets[:, None], g[:, None], 0.0)
        d_scores = (d_scores * to_units[:, None]).astype(leading[0].dtype)
        d_hidden = _over_words(dot("tv,vi->ti", d_scores, leading[0]), vocab_axis)
        d_hidden *= (unit / (GRADIENT_SCALE * SCALE * temperature))[:, None]
        weighted = (hidden * (unit / largest)[:, None]).astype(leading[0].dtype)
        return d_lm_head + dot("tv,ti->vi", d_scores, weighted), d_hidden.astype(hidden.dtype)

    chunks = Chunks(len(targets), words)
    start = vary_over(jnp.zeros(lm_head.shape, jnp.float32), varying_axes(lm_head, g, e))
    tokens = (hidden, targets, normaliser, entropy, g, e, unit, to_units)
    kept = None if scores is None else chunks.split(scores)[0]
    d_lm_head, d_hidden = jax.lax.scan(one, start, (chunks.split(*tokens), kept))
    d_lm_head = d_lm_head * (largest / (GRADIENT_SCALE * temperature))
    return chunks.join(d_hidden), d_lm_head.astype(lm_head.dtype), None, None


_on_matrix_units.defvjp(_forward, _backward)
