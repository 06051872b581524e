"""What a model remembers between calls: one state per lightning layer, keys and values per softmax layer."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1jax.config import LIGHTNING, ModelConfig
from m1jax.errors import UserError


class LightningCache(NamedTuple):
    """``state[i, b]`` is S of layer ``i * period + j``: [periods, batch, heads, key, value], always float32."""

    state: Float[Array, "periods batch heads key value"]


class SoftmaxCache(NamedTuple):
    """Rotated keys and values: [periods, batch, max_length, kv_heads, head_dim] in the compute dtype."""

    keys: Float[Array, "periods batch max_length kv_heads channels"]
    values: Float[Array, "periods batch max_length kv_heads channels"]


class Cache(NamedTuple):
    """The memory of a batch of sequences. A pytree: it goes into a call and a new one comes out.

    ``lengths[b]`` counts the tokens of row b seen so far; ``layers[j]`` belongs to the layers at position j of
    each period. Only softmax layers grow with ``max_length``.
    """

    lengths: Int[Array, " batch"]
    layers: tuple[LightningCache | SoftmaxCache, ...]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """Room for ``max_length`` tokens of ``batch`` sequences, none of them seen yet.

        Raises:
            UserError: ``max_length`` is more than the model's positions.
        """
        if not 0 < max_length <= config.max_position_embeddings:
            raise UserError(
                f"max_length = {max_length} must be between 1 and the model's "
                f"max_position_embeddings = {config.max_position_embeddings}"
            )
        state = (config.num_periods, batch, config.num_heads, config.head_dim, config.head_dim)
        kv = (config.num_periods, batch, max_length, config.num_kv_heads, config.head_dim)
        layers = tuple(
            LightningCache(jnp.zeros(state, jnp.float32))
            if kind == LIGHTNING
            else SoftmaxCache(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype))
            for kind in config.layer_types[: config.period]
        )
        return cls(jnp.zeros(batch, jnp.int32), layers)

    @property
    def max_length(self) -> int | None:
        """Tokens that fit, or None where no layer keeps any (a model of lightning layers only)."""
        return next((layer.keys.shape[2] for layer in self.layers if isinstance(layer, SoftmaxCache)), None)
