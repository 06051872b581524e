"""One token from the logits of each row: temperature, nucleus, a key per request."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    logits: Float[Array, "rows vocab"],
    keys: Key[Array, " rows"],
    *,
    temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float | None = None,
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """Draw one token per row.

    Each row uses one uniform number from its own key (inversion of the cumulative distribution), so its token depends
    neither on the other rows nor on their number.

    Args:
        logits: [N, V] float32.
        keys: [N] typed keys, fresh for every token.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: draw from the smallest set of most probable tokens whose probabilities sum to at least top_p (Holtzman et
            al., 2020). None: from all, which spares a sort.

    Returns:
        tokens [N] int32 and their log-probabilities [N] float32 under the tempered distribution *before* the nucleus
        cut (at temperature 0: at temperature 1), that is, of the policy that `MiniMaxM1.log_probs` computes in
        training.
    """
    greedy = temperature == 0
    log_probs = jax.nn.log_softmax(logits / jnp.where(greedy, 1.0, temperature), axis=-1)
    u = jax.vmap(jax.random.uniform)(keys)[:, None]
    if top_p is None:
        drawn = _invert(jnp.exp(log_probs), u)
    else:
        order = jnp.argsort(-log_probs, axis=-1)
        probs = jnp.take_along_axis(jnp.exp(log_probs), order, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        rank = _invert(jnp.where(before < top_p, probs, 0.0), u)
        drawn = jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
    tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
    return tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]


def _invert(probs: jax.Array, u: jax.Array) -> jax.Array:
    """[N]: the first index whose cumulative probability exceeds u * total. Never one of probability zero, because u <
    1."""
    cumulative = jnp.cumsum(probs, axis=-1)
    return jnp.argmax(cumulative > u * cumulative[:, -1:], axis=-1)
