"""Softmax attention with grouped key/value heads and partial RoPE: every eighth layer of M1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1jax.config import ModelConfig
from m1jax.model.cache import SoftmaxCache
from m1jax.model.layers import init_normal, linear, rotary
from m1jax.model.parallel import softmax_attention
from m1jax.sharding import constrain


class SoftmaxAttention(nnx.Module):
    """Parameters of one softmax layer per period, [periods, out, in], and its forward pass on one period's slice."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.head_dim, self.rotary_dim, self.theta = config.head_dim, config.rotary_dim, config.rope_theta
        periods, hidden, std = config.num_periods, config.hidden_size, config.initializer_range
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = init_normal(rngs, (periods, queries, hidden), std, dtype)
        self.k_proj = init_normal(rngs, (periods, keys, hidden), std, dtype)
        self.v_proj = init_normal(rngs, (periods, keys, hidden), std, dtype)
        self.o_proj = init_normal(rngs, (periods, hidden, queries), std, dtype)

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        positions: Int[Array, "batch time"],
        cache: SoftmaxCache | None,
        segment_ids: Int[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time hidden"], SoftmaxCache | None]:
        """Causal attention, scale 1/sqrt(head_dim). With a cache, new keys and values are written at ``positions``."""
        batch, time, _ = x.shape
        x = constrain(x, "batch", "time", None)
        split = (batch, time, -1, self.head_dim)
        q = linear(x, self.q_proj[...]).reshape(split)
        k = linear(x, self.k_proj[...]).reshape(split)
        v = linear(x, self.v_proj[...]).reshape(split)
        q = rotary(q, positions, rotary_dim=self.rotary_dim, theta=self.theta)
        k = rotary(k, positions, rotary_dim=self.rotary_dim, theta=self.theta)
        if cache is None:
            out = softmax_attention(q, k, v, segment_ids=segment_ids)
        else:
            # Rows of different lengths write at different places; what falls outside the cache is dropped, and what
            # padding wrote lies behind every query until real tokens overwrite it.
            at = (jnp.arange(batch)[:, None], positions)
            cache = SoftmaxCache(
                cache.keys.at[at].set(k.astype(cache.keys.dtype), mode="drop", unique_indices=True),
                cache.values.at[at].set(v.astype(cache.values.dtype), mode="drop", unique_indices=True),
            )
            out = softmax_attention(q, cache.keys, cache.values, q_start=positions[:, 0])
        out = linear(out.reshape(batch, time, -1), self.o_proj[...])
        return constrain(out, "batch", "residual", None), cache
