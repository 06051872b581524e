"""Trainer against sampler: factors for a loss whose tokens were drawn by another program than the one that trains.

rho_t = pi_trainer(token) / pi_sampler(token), both with the parameters that generated: without rounding and without
top-p it is one. The factors multiply a loss's terms and carry no gradient; the normaliser stays (a token whose factor
is zero still counts in it).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m1jax.rl.losses import LIMIT
from m1jax.rl.sequences import sequence_mean, sequence_sum


def truncated(
    trainer_logp: Float[Array, "batch time"],
    sampler_logp: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    cap: float = 2.0,
) -> Float[Array, "batch time"]:
    """Truncated importance sampling: `min(rho_t, cap)`."""
    return jnp.where(mask, jnp.minimum(jnp.exp(_gap(trainer_logp, sampler_logp, mask)), cap), 0.0)


def truncated_sequence(
    trainer_logp: Float[Array, "batch time"],
    sampler_logp: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    *,
    cap: float = 2.0,
) -> Float[Array, "batch time"]:
    """The same of the whole sequence: `min(product of rho_t, cap)` at each of its tokens."""
    total = sequence_sum(_gap(trainer_logp, sampler_logp, mask), mask, segment_ids)
    return jnp.where(mask, jnp.minimum(jnp.exp(jnp.clip(total, -LIMIT, LIMIT)), cap), 0.0)


def icepop(
    trainer_logp: Float[Array, "batch time"],
    sampler_logp: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> Float[Array, "batch time"]:
    """IcePop: rho_t within [low, high], zero outside."""
    rho = jnp.exp(_gap(trainer_logp, sampler_logp, mask))
    return jnp.where(mask & (rho >= low) & (rho <= high), rho, 0.0)


def geometric_rejection(
    trainer_logp: Float[Array, "batch time"],
    sampler_logp: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    *,
    low: float,
    high: float,
) -> Float[Array, "batch time"]:
    """One for sequences whose geometric mean of rho_t lies within [low, high], zero for the others."""
    mean = jnp.exp(sequence_mean(_gap(trainer_logp, sampler_logp, mask), mask, segment_ids))
    return (mask & (mean >= low) & (mean <= high)).astype(jnp.float32)


Correction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""factors from (trainer_logp, sampler_logp, mask, segment_ids)"""

CORRECTIONS: dict[str, Correction] = {
    "truncated": lambda trainer, sampler, mask, _: truncated(trainer, sampler, mask),
    "truncated-sequence": truncated_sequence,
    "icepop": lambda trainer, sampler, mask, _: icepop(trainer, sampler, mask),
    "geometric": lambda *arrays: geometric_rejection(*arrays, low=0.99, high=1.01),
}


def _gap(trainer_logp: jax.Array, sampler_logp: jax.Array, mask: jax.Array) -> jax.Array:
    """log rho, clamped; zero outside the mask, and where both say the same: -inf too."""
    same = ~mask | (trainer_logp == sampler_logp)
    gap = jnp.where(same, 0.0, trainer_logp) - jnp.where(same, 0.0, sampler_logp)
    return jax.lax.stop_gradient(jnp.clip(gap, -LIMIT, LIMIT))
