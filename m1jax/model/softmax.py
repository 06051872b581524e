"""Softmax attention with grouped key/value heads and partial RoPE: every eighth layer of M1."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from m1jax.config import ModelConfig
from m1jax.model.cache import SoftmaxCache
from m1jax.model.layers import Call, Place, Weights, linear, rotary
from m1jax.model.parallel import softmax_attention
from m1jax.sharding import constrain


class SoftmaxAttention(nnx.Module):
    """Parameters of a run of softmax layers, [layers, out, in], and the forward pass of one of them."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.head_dim, self.rotary_dim, self.theta = config.head_dim, config.rotary_dim, config.rope_theta
        self.q_proj = nnx.Param(weights["attention", "q_proj"])
        self.k_proj = nnx.Param(weights["attention", "k_proj"])
        self.v_proj = nnx.Param(weights["attention", "v_proj"])
        self.o_proj = nnx.Param(weights["attention", "o_proj"])

    def __call__(
        self, x: Float[Array, "batch time hidden"], call: Call, place: Place, memory: SoftmaxCache | None
    ) -> tuple[Float[Array, "batch time hidden"], SoftmaxCache | None]:
        """Causal attention, scale 1/sqrt(head_dim). Given a memory, new keys and values are written into it."""
        batch, time, _ = x.shape
        x = constrain(x, "batch", "time", None)
        split = (batch, time, -1, self.head_dim)
        q = linear(x, self.q_proj[...]).reshape(split)
        k = linear(x, self.k_proj[...]).reshape(split)
        v = linear(x, self.v_proj[...]).reshape(split)
        q = rotary(q, call.positions, rotary_dim=self.rotary_dim, theta=self.theta)
        k = rotary(k, call.positions, rotary_dim=self.rotary_dim, theta=self.theta)
        if memory is None:
            out = softmax_attention(q, k, v, segment_ids=call.segment_ids)
        else:
            memory = memory.append(place.layer, k, v, call.positions, call.pages, call.segment_ids)
            out = memory.attend(place.layer, q, call.positions, call.pages, call.segment_ids)
        out = linear(out.reshape(batch, time, -1), self.o_proj[...])
        return constrain(out, "batch", "residual", None), memory
