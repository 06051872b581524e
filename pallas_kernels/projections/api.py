"""The public op: arguments checked, implementation chosen."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import is_known
from pallas_kernels.ladder import Ladder

LADDER = Ladder(
    op="project",
    package="pallas_kernels.projections",
    implementations=("xla", "hopper"),
    preferred={"gpu": ("hopper",)},
    portable="xla",
)


class Projection(NamedTuple):
    """A linear map of all layers, and what becomes of its output.

    Attributes:
      weights: [L,R,D], the orientation of checkpoints, [out, in].
      activation: of the output, which is rounded before and after.
      parts: into how many arrays the output is dealt,
      width: so many channels at a time. One part has them all.
    """

    weights: jax.Array
    activation: Literal["none", "silu", "sigmoid"] = "none"
    parts: int = 1
    width: int | None = None


def project(
    x: jax.Array, projections: Sequence[Projection], layer: jax.Array | int, *, implementation: str = "auto"
) -> list[jax.Array]:
    """Every projection of a layer, activation(x weights[layer]^T), of the same tokens. No gradients.

    Args:
      x: [N,D] float.
      projections: weights in x's dtype.
      layer: int32 scalar, may be traced, 0 <= layer < L.
      implementation: "auto" (the best that can run here), "xla" (portable) or "hopper" (one kernel for up to 256 tokens
        in bfloat16, which reads the weights where they lie).

    Returns:
      [N,R/parts] of each part of each projection in turn, in x's dtype.

    Raises:
      ValueError: a shape or dtype that does not fit, an unknown implementation, or a named one that cannot run here.
    """
    if x.ndim != 2:
        raise ValueError(f"project: x must be [N, D], got {x.shape}")
    for weights, _, parts, width in projections:
        if weights.ndim != 3 or weights.shape[2] != x.shape[1] or weights.dtype != x.dtype:
            found = f"{weights.shape} {weights.dtype}"
            raise ValueError(f"project: weights must be [L, R, {x.shape[1]}] {x.dtype}, got {found}")
        if is_known(layer) and not 0 <= layer < len(weights):
            raise ValueError(f"project: layer must be in 0..{len(weights) - 1}, got {layer}")
        if parts > 1 and (width is None or weights.shape[1] % (parts * width)):
            raise ValueError(f"project: {weights.shape[1]} channels cannot be dealt out to {parts} by {width}")
    name = LADDER.choose(implementation, x, projections)
    return LADDER.module(name).project(x, projections, jnp.asarray(layer, jnp.int32))
