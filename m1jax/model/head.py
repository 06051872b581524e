"""From hidden states to words: float32 logits, and log-probabilities without ever holding [batch, time, vocab]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1jax.model import parallel
from m1jax.model.layers import apart, linear

CHUNK_ELEMENTS = 2**26  # logits alive at once in log_probs: 256 MiB of float32, whatever time and vocabulary are


def logits(hidden: Float[Array, "... hidden"], lm_head: Float[Array, "vocab hidden"]) -> Float[Array, "... vocab"]:
    """Float32 product: the report (section 3.2, figure 3) needs it for sampler and trainer to agree."""
    return linear(hidden.astype(jnp.float32), lm_head.astype(jnp.float32), precision="highest")


def log_probs(
    hidden: Float[Array, "batch time hidden"],
    lm_head: Float[Array, "vocab hidden"],
    targets: Int[Array, "batch time"],
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """Log-probability of each target and entropy of its distribution, in nats, float32.

    Works through time in chunks whose logits are recomputed for the gradient, so that memory does not grow with
    time x vocabulary (80k tokens x 200,064 words would be 64 GB).
    """
    return parallel.log_probs(_log_probs, hidden, lm_head, targets, temperature)


def _log_probs(
    hidden: Float[Array, "batch time hidden"],
    lm_head: Float[Array, "part_of_vocab hidden"],
    targets: Int[Array, "batch time"],
    temperature: float | Float[Array, ""],
    vocab_axis: str | None,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """The same, where the words may be spread over a mesh axis: each device has its part of ``lm_head``."""
    batch, time, width = hidden.shape
    words = lm_head.shape[0]
    chunk = min(time, max(1, CHUNK_ELEMENTS // (batch * words)))
    padded = -(-time // chunk) * chunk
    first_word = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * words

    def total(x: jax.Array) -> jax.Array:
        return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padded - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, padded // chunk, chunk, *x.shape[2:]), 1, 0)

    def one(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logits(hidden, lm_head) / temperature
        top = apart(jax.lax.stop_gradient(jnp.max(scores, axis=-1)))
        if vocab_axis is not None:
            top = jax.lax.pmax(top, vocab_axis)
        weights = jnp.exp(scores - top[..., None])
        mass = total(jnp.sum(weights, axis=-1))
        normaliser = top + jnp.log(mass)
        mean = total(jnp.sum(weights * scores, axis=-1)) / mass
        index = targets - first_word
        here = (index >= 0) & (index < words)
        chosen = jnp.take_along_axis(scores, jnp.where(here, index, 0)[..., None], axis=-1)[..., 0]
        chosen = total(jnp.where(here, chosen, 0.0))
        return chosen - normaliser, normaliser - mean

    if chunk == time:  # one chunk: its logits may stay
        return one(hidden, targets)
    one = jax.checkpoint(one)
    _, parts = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (chunks(hidden), chunks(targets)))
    log_prob, entropy = (jnp.moveaxis(part, 0, 1).reshape(batch, padded)[:, :time] for part in parts)
    return log_prob, entropy
