"""Mixture of experts: dropless top-k routing in float32, its balancing loss, and the optional shared expert."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1jax.config import ModelConfig
from m1jax.model.layers import init_normal, linear
from m1jax.model.parallel import experts
from pallas_kernels import PADDING


class Routing(NamedTuple):
    """What the router decided: ``probabilities`` over all experts, and the chosen ``experts`` with their weights."""

    probabilities: Float[Array, "batch time experts"]
    experts: Int[Array, "batch time k"]
    weights: Float[Array, "batch time k"]


class SharedMLP(nnx.Module):
    """The expert that every token passes (absent in M1: ``shared_intermediate_size`` is 0)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        inner, outer = (config.num_periods, config.shared_intermediate_size), config.hidden_size
        std = config.initializer_range
        self.gate_proj = init_normal(rngs, (*inner, outer), std, dtype)
        self.up_proj = init_normal(rngs, (*inner, outer), std, dtype)
        self.down_proj = init_normal(rngs, (inner[0], outer, inner[1]), std, dtype)

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        return linear(jax.nn.silu(linear(x, self.gate_proj[...])) * linear(x, self.up_proj[...]), self.down_proj[...])


class MoE(nnx.Module):
    """Parameters of one expert layer per period and its forward pass on one period's slice.

    The router ``gate`` is float32 whatever the other parameters are, as in the released checkpoint.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.num_experts, self.k = config.num_experts, config.experts_per_token
        periods, hidden, std = config.num_periods, config.hidden_size, config.initializer_range
        experts, inner = config.num_experts, config.intermediate_size
        self.gate = init_normal(rngs, (periods, experts, hidden), std, jnp.float32)
        self.w1 = init_normal(rngs, (periods, experts, inner, hidden), std, dtype)
        self.w3 = init_normal(rngs, (periods, experts, inner, hidden), std, dtype)
        self.w2 = init_normal(rngs, (periods, experts, hidden, inner), std, dtype)
        if config.shared_intermediate_size:
            self.shared_mlp = SharedMLP(config, rngs=rngs, dtype=dtype)
            self.coefficient = init_normal(rngs, (periods, 1, hidden), std, dtype)
        else:
            self.shared_mlp = self.coefficient = None

    def route(self, x: Float[Array, "batch time hidden"]) -> Routing:
        """Float32 softmax over all experts, the k largest, renormalised to sum to one."""
        logits = jnp.einsum("bti,ei->bte", x.astype(jnp.float32), self.gate[...], precision="highest")
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.k)
        return Routing(probabilities, experts, weights / jnp.sum(weights, axis=-1, keepdims=True))

    def __call__(
        self, x: Float[Array, "batch time hidden"], segment_ids: Int[Array, "batch time"] | None
    ) -> tuple[Float[Array, "batch time hidden"], Routing]:
        routing = self.route(x)
        routes = routing.experts
        if segment_ids is not None:  # an id no expert has: padding costs nothing
            routes = jnp.where(segment_ids[..., None] == PADDING, self.num_experts, routes)
        out = experts(x, self.w1[...], self.w3[...], self.w2[...], routes, routing.weights)
        if self.shared_mlp is not None and self.coefficient is not None:
            share = jax.nn.sigmoid(linear(x.astype(jnp.float32), self.coefficient[...]))
            mixed = out.astype(jnp.float32) * (1 - share) + self.shared_mlp(x).astype(jnp.float32) * share
            out = mixed.astype(x.dtype)
        return out, routing


def balancing_loss(
    routing: Routing, segment_ids: Int[Array, "batch time"] | None, *, over: Literal["sequence", "batch"] = "sequence"
) -> Float[Array, "batch time"]:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, eq. 4-6), given to every token it was computed from.

    E * sum_e f_e P_e, where f_e counts the assignments to expert e per token and P_e is its mean probability. Both are
    taken over one sequence, so that packing, micro-batching and sharding cannot change the loss; ``over="batch"``
    takes them over all tokens, as Switch does. A perfectly balanced router gives k. PADDING tokens get 0.
    """
    num_experts = routing.probabilities.shape[-1]
    real = jnp.ones(routing.experts.shape[:2]) if segment_ids is None else (segment_ids != PADDING).astype(jnp.float32)
    chosen = jnp.sum(jax.nn.one_hot(routing.experts, num_experts), axis=-2)
    sums = jnp.concatenate([chosen, routing.probabilities, jnp.ones_like(real)[..., None]], axis=-1) * real[..., None]
    if over == "batch":
        sums = jnp.sum(sums, axis=(0, 1), keepdims=True)
    elif segment_ids is None:
        sums = jnp.sum(sums, axis=1, keepdims=True)
    else:
        numbers = jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1)
        totals = jax.vmap(lambda x, n: jax.ops.segment_sum(x, n, num_segments=x.shape[0]))(sums, numbers)
        sums = jnp.take_along_axis(totals, numbers[..., None], axis=1)
    assigned, probability, count = jnp.split(sums, (num_experts, 2 * num_experts), axis=-1)
    loss = num_experts * jnp.sum(assigned * probability, axis=-1) / jnp.maximum(count[..., 0], 1.0) ** 2
    return loss * real
