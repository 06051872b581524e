"""Mixture of experts: dropless top-k routing in float32, its balancing loss, and the optional shared expert."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from m1jax.config import ModelConfig
from m1jax.model.layers import Weights, kept, linear
from m1jax.model.parallel import expert_routes, experts, with_all_of_time
from pallas_kernels import PADDING, target_platform

PART = 64
"""tokens whose numbers are added in one place before those of a whole segment are"""


class Routing(NamedTuple):
    """What the router decided: ``probabilities`` over all experts, which decoding does not need, and the chosen
    ``experts`` with their weights."""

    probabilities: Float[Array, "batch time experts"] | None
    experts: Int[Array, "batch time k"]
    weights: Float[Array, "batch time k"]


class SharedMLP(nnx.Module):
    """The expert that every token passes (absent in M1: ``shared_intermediate_size`` is 0)."""

    def __init__(self, weights: Weights) -> None:
        self.gate_proj = nnx.Param(weights["moe", "shared_mlp", "gate_proj"])
        self.up_proj = nnx.Param(weights["moe", "shared_mlp", "up_proj"])
        self.down_proj = nnx.Param(weights["moe", "shared_mlp", "down_proj"])

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        return linear(jax.nn.silu(linear(x, self.gate_proj[...])) * linear(x, self.up_proj[...]), self.down_proj[...])


class MoE(nnx.Module):
    """Parameters of the expert layers of a run, [layers, ...], and the forward pass of one of them.

    The router ``gate`` is float32 whatever the other parameters are, as in the released checkpoint.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.num_experts, self.k = config.num_experts, config.experts_per_token
        self.gate = nnx.Param(weights["moe", "gate"])
        self.w1 = nnx.Param(weights["moe", "w1"])
        self.w3 = nnx.Param(weights["moe", "w3"])
        self.w2 = nnx.Param(weights["moe", "w2"])
        if config.shared_intermediate_size:
            self.shared_mlp = SharedMLP(weights)
            self.coefficient = nnx.Param(weights["moe", "coefficient"])
        else:
            self.shared_mlp = self.coefficient = None

    def route(
        self,
        x: Float[Array, "batch time hidden"],
        replayed: Integer[Array, "batch time k"] | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> Routing:
        """Float32 softmax over all experts, the k largest, renormalised to sum to one.

        Where the choice is ``replayed``, the weights are still today's probabilities of those experts, so that the
        router's gradient flows as it does for a choice of its own. An expert that does not exist has weight zero.
        """
        if self.gate[...].ndim == 3:  # those of all layers of the run
            return Routing(None, *expert_routes(x, self.gate[...], layer, self.k))
        logits = router_logits(x, self.gate[...])
        probabilities = jax.nn.softmax(kept(logits), axis=-1)
        if replayed is None:
            weights, experts = jax.lax.top_k(probabilities, self.k)
        else:
            experts = replayed.astype(jnp.int32)
            weights = jnp.take_along_axis(probabilities, experts, axis=-1, mode="fill", fill_value=0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if self.k == 1:  # w / w: its gradient would be rounding, which Adam takes for a direction
            return Routing(probabilities, experts, jnp.where(total == 0, 0.0, 1.0))
        return Routing(probabilities, experts, weights / jnp.where(total == 0, 1.0, total))

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None = None,
        replayed: Integer[Array, "batch time k"] | None = None,
        layer: int | Int[Array, ""] | None = None,
        stacks: tuple[jax.Array, ...] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], Routing]:
        """The experts' output and the routing, in which PADDING is assigned to an expert that does not exist.

        Args:
            x: the normed residual stream.
            segment_ids: marks PADDING, which costs nothing.
            replayed: experts chosen before, instead of the router's choice.
            layer: the number of this layer, where ``w1``, ``w3`` and ``w2`` are still those of the whole run, or
            stacks: are given beside them.
        """
        routing = self.route(x, replayed, 0 if layer is None else layer)
        if segment_ids is not None:
            padding = segment_ids[..., None] == PADDING
            routing = routing._replace(experts=jnp.where(padding, self.num_experts, routing.experts))
        out = experts(x, self.w1[...], self.w3[...], self.w2[...], routing.experts, routing.weights, layer, stacks)
        if self.shared_mlp is not None and self.coefficient is not None:
            share = jax.nn.sigmoid(linear(x.astype(jnp.float32), self.coefficient[...]))
            mixed = out.astype(jnp.float32) * (1 - share) + self.shared_mlp(x).astype(jnp.float32) * share
            out = mixed.astype(x.dtype)
        return out, routing


def router_logits(
    x: Float[Array, "batch time hidden"], gate: Float[Array, "experts hidden"]
) -> Float[Array, "batch time experts"]:
    """``x @ gate.T`` of a float32 gate, float32 whatever x is.

    Bfloat16 activations on a GPU go through its matrix units, which know no float32: the gate is a sum of three
    bfloat16 numbers. There the gradients are bfloat16 products, as all others are.
    """
    if x.dtype == jnp.bfloat16 and target_platform() == "gpu":
        return cast(jax.Array, _on_matrix_units(x, gate))
    return jnp.einsum("bti,ei->bte", x.astype(jnp.float32), gate, precision="highest")


@jax.custom_vjp
def _on_matrix_units(x: jax.Array, gate: jax.Array) -> jax.Array:
    return _on_matrix_units_forward(x, gate)[0]


def _on_matrix_units_forward(x: jax.Array, gate: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rest, parts = gate, []
    for _ in range(3):
        part = jax.lax.reduce_precision(rest, 8, 7)  # a cast there and back counts as exact to XLA
        parts.insert(0, part.astype(x.dtype))
        rest = rest - part
    products = jnp.einsum("bti,ei->bte", x, jnp.concatenate(parts), preferred_element_type=jnp.float32)
    low, middle, high = jnp.split(products, 3, axis=-1)
    return low + middle + high, (x, gate)


def _on_matrix_units_backward(saved: tuple[jax.Array, jax.Array], given: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, gate = saved
    given = given.astype(x.dtype)
    dx = jnp.einsum("bte,ei->bti", given, gate.astype(x.dtype))
    return dx, jnp.einsum("bte,bti->ei", given, x, preferred_element_type=jnp.float32).astype(gate.dtype)


_on_matrix_units.defvjp(_on_matrix_units_forward, _on_matrix_units_backward)


def balancing_loss(
    routing: Routing, segment_ids: Int[Array, "batch time"] | None, *, over: Literal["sequence", "batch"] = "sequence"
) -> Float[Array, "batch time"]:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, eq. 4-6), given to every token it was computed from.

    E * sum_e f_e P_e, where f_e counts the assignments to expert e per token and P_e is its mean probability. Both are
    taken over one sequence, so that packing, micro-batching and sharding cannot change the loss; ``over="batch"``
    takes them over all tokens, as Switch does. A perfectly balanced router gives k. PADDING tokens get 0.
    """
    assert routing.probabilities is not None
    num_experts = routing.probabilities.shape[-1]
    real = jnp.ones(routing.experts.shape[:2]) if segment_ids is None else (segment_ids != PADDING).astype(jnp.float32)
    chosen = jnp.sum(jax.nn.one_hot(routing.experts, num_experts), axis=-2)
    sums = jnp.concatenate([chosen, routing.probabilities, jnp.ones_like(real)[..., None]], axis=-1) * real[..., None]
    if over == "batch":
        sums = jnp.sum(sums, axis=(0, 1), keepdims=True)
    elif segment_ids is None:
        sums = jnp.sum(sums, axis=1, keepdims=True)
    else:
        sums = kept(with_all_of_time(_over_segments, sums, segment_ids))
    assigned, probability, count = jnp.split(sums, (num_experts, 2 * num_experts), axis=-1)
    loss = num_experts * jnp.sum(assigned * probability, axis=-1) / jnp.maximum(count[..., 0], 1.0) ** 2
    return loss * real


@jax.custom_vjp
def _over_segments(
    values: Float[Array, "batch time channels"], segment_ids: Int[Array, "batch time"]
) -> Float[Array, "batch time channels"]:
    """At each token the sum over its segment, which is also this function's own gradient.

    Summed in two stages, first within parts of a segment, then over its parts: thousands of atomic additions to one
    place are slow on a GPU.
    """
    time = values.shape[1]
    segment = jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1)
    part = segment + jnp.arange(time) // PART  # one number for each segment in each PART tokens
    parts = time + time // PART + 1

    def row(values: jax.Array, segment: jax.Array, part: jax.Array) -> jax.Array:
        sums = jnp.zeros((parts, values.shape[1]), values.dtype).at[part].add(values, indices_are_sorted=True)
        owner = jnp.full(parts, time).at[part].set(segment, indices_are_sorted=True)
        totals = jnp.zeros_like(values).at[owner].add(sums, mode="drop")  # parts that do not exist have no owner
        return totals.at[segment].get(indices_are_sorted=True)

    return jax.vmap(row)(values, segment, part)


_over_segments.defvjp(
    lambda values, ids: (_over_segments(values, ids), ids), lambda ids, d: (_over_segments(d, ids), None)
)
