"""The public op: arguments checked, implementation chosen."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.ladder import Ladder
from pallas_kernels.norms.api import Norm, Term, check

LADDER = Ladder(
    op="expert_routes",
    package="pallas_kernels.experts.routes",
    implementations=("xla", "hopper"),
    preferred={"gpu": ("hopper",)},
    portable="xla",
)


def expert_routes(
    terms: Sequence[Term],
    norm: Norm,
    gates: jax.Array,
    layer: jax.Array | int,
    *,
    k: int,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The norm y of a sum, its k experts with the largest softmax(y gate^T), those probabilities over their sum.

    No gradients.

    Args:
      terms, norm: as in `norms.normed`.
      gates: [L,E,D] float32, of all layers. Scores are float32, whatever y is.
      layer: int32 scalar, may be traced, 0 <= layer < L: whose norm and gate are meant.
      k: 1 to E.
      implementation: "auto" (the best that can run here), "xla" (portable) or "hopper" (one kernel, which reads the
        gate where it lies).

    Returns:
      y [N,D] in the terms' dtype; routes [N,k] int32, the largest first, of equals the first; weights [N,k] float32.

    Raises:
      ValueError: a shape or dtype that does not fit, an unknown implementation, or a named one that cannot run here.
    """
    check(terms, norm, layer)
    x = terms[0][0]
    if gates.ndim != 3 or gates.shape[2] != x.shape[1] or gates.dtype != jnp.float32:
        raise ValueError(f"expert_routes: gates must be [L, E, {x.shape[1]}] float32, got {gates.shape} {gates.dtype}")
    if not 1 <= k <= gates.shape[1]:
        raise ValueError(f"expert_routes: k must be 1 to the number of experts, {gates.shape[1]}, got {k}")
    if len(gates) != len(norm.weights):
        found = f"{len(gates)}, {len(norm.weights)}"
        raise ValueError(f"expert_routes: gates and norm must have as many layers, got {found}")
    name = LADDER.choose(implementation, terms, gates)
    return LADDER.module(name).routes(terms, norm, gates, jnp.asarray(layer, jnp.int32), k)
