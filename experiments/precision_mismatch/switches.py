"""What the product does not offer: a head and lightning states that are rounded to bfloat16."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1jax.model import head
from m1jax.model.cache import LightningCache

Bits = Literal["float32", "bfloat16"]


@contextlib.contextmanager
def precision(head_bits: Bits, state_bits: Bits) -> Iterator[None]:
    """Sampler and trainer with such a head, and a sampler whose cache holds such states, compiled anew.

    A trainer keeps no states between calls: nothing of it changes with them.
    """
    jax.clear_caches()
    with contextlib.ExitStack() as stack:
        if head_bits == "bfloat16":
            stack.enter_context(mock.patch.object(head, "logits", _logits))
            stack.enter_context(mock.patch.object(head, "log_probs", _log_probs))
        if state_bits == "bfloat16":
            stack.enter_context(mock.patch.object(LightningCache, "attend", _attend))
        yield
    jax.clear_caches()


def rounded(x: Array) -> Array:
    """To bfloat16's bits, as float32. (A cast there and back counts as exact to XLA on a GPU.)"""
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


def _logits(hidden: Float[Array, "... hidden"], lm_head: Float[Array, "vocab hidden"]) -> Float[Array, "... vocab"]:
    """The product of bfloat16 numbers, rounded to bfloat16."""
    operands = hidden.astype(jnp.bfloat16), lm_head.astype(jnp.bfloat16)
    return rounded(jnp.einsum("...i,vi->...v", *operands, preferred_element_type=jnp.float32))


def _log_probs(
    hidden: Float[Array, "batch time hidden"],
    lm_head: Float[Array, "vocab hidden"],
    targets: Int[Array, "batch time"],
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """`head.log_probs` of those logits; softmax in float32."""
    logp = jax.nn.log_softmax(_logits(hidden, lm_head) / temperature)
    return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, axis=-1)


_float32_attend = LightningCache.attend


def _attend(self: LightningCache, layer: Any, *arguments: Any) -> tuple[Array, LightningCache]:
    """`LightningCache.attend`, its states rounded whenever they are written."""
    out, cache = _float32_attend(self, layer, *arguments)
    return out, LightningCache(rounded(cache.state))  # all others are rounded already
