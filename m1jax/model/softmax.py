"""Softmax attention with grouped key/value heads and partial RoPE: every eighth layer of M1."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from m1jax.config import ModelConfig
from m1jax.model.cache import SoftmaxCache
from m1jax.model.layers import Call, Place, Weights, linear, rotary
from m1jax.model.parallel import project, project_back, softmax_attention
from m1jax.sharding import constrain, constrain_residual
from pallas_kernels import Projection


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
        weights = [self.q_proj[...], self.k_proj[...], self.v_proj[...]]
        if weights[0].ndim == 2:
            q, k, v = (linear(x, weight).reshape(split) for weight in weights)
        else:  # those of all layers of the run
            q, k, v = (a.reshape(split) for a in project(x, [Projection(w) for w in weights], place.layer))
        q = rotary(q, call.positions, rotary_dim=self.rotary_dim, theta=self.theta)
        k = rotary(k, call.positions, rotary_dim=self.rotary_dim, theta=self.theta)
        if memory is None:
            out = softmax_attention(q, k, v, segment_ids=call.segment_ids)
        else:
            memory = memory.append(place.layer, k, v, call.positions, call.pages, call.segment_ids)
            out = memory.attend(place.layer, q, call.positions, call.pages, call.segment_ids)
        out, weight = out.reshape(batch, time, -1), self.o_proj[...]
        out = linear(out, weight) if weight.ndim == 2 else project_back(out, weight, place.layer)
        return constrain_residual(out), memory
