"""The public op: arguments checked, implementation chosen."""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import is_known
from pallas_kernels.ladder import Ladder

LADDER = Ladder(
    op="expert_routes",
    package="pallas_kernels.experts.routes",
    implementations=("xla", "hopper"),
    preferred={"gpu": ("hopper",)},
    portable="xla",
)


def expert_routes(
    x: jax.Array, gates: jax.Array, layer: jax.Array | int, *, k: int, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """The k experts with the largest softmax(x gate^T), and those probabilities over their sum. No gradients.

    Args:
      x: [N,D] float.
      gates: [L,E,D] float32, of all layers. Scores are float32, whatever x is.
      layer: int32 scalar, may be traced, 0 <= layer < L: whose gate is meant.
      k: 1 to E.
      implementation: "auto" (the best that can run here), "xla" (portable) or "hopper" (one kernel, which reads the
        gate where it lies).

    Returns:
      routes [N,k] int32, the largest first, of equals the first, and their weights [N,k] float32.

    Raises:
      ValueError: a shape or dtype that does not fit, an unknown implementation, or a named one that cannot run here.
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expert_routes: x must be [N, D] of floats, got {x.shape} {x.dtype}")
    if gates.ndim != 3 or gates.shape[2] != x.shape[1] or gates.dtype != jnp.float32:
        raise ValueError(f"expert_routes: gates must be [L, E, {x.shape[1]}] float32, got {gates.shape} {gates.dtype}")
    if not 1 <= k <= gates.shape[1]:
        raise ValueError(f"expert_routes: k must be 1 to the number of experts, {gates.shape[1]}, got {k}")
    if is_known(layer) and not 0 <= layer < len(gates):
        raise ValueError(f"expert_routes: layer must be in 0..{len(gates) - 1}, got {layer}")
    name = LADDER.choose(implementation, x, gates, k)
    return LADDER.module(name).routes(x, gates, jnp.asarray(layer, jnp.int32), k)
