"""The public op: arguments checked, implementation chosen."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import is_known
from pallas_kernels.ladder import Ladder

LADDER = Ladder(
    op="normed",
    package="pallas_kernels.norms",
    implementations=("xla", "hopper"),
    preferred={"gpu": ("hopper",)},
    portable="xla",
)

Term = tuple[jax.Array, float]
"""[N,D], and what it is multiplied by in a sum."""


class Norm(NamedTuple):
    """RMSNorm (Zhang & Sennrich 2019) of all layers: weights [L,D]."""

    weights: jax.Array
    eps: float


def normed(
    terms: Sequence[Term],
    norm: Norm,
    layer: jax.Array | int,
    *,
    gate: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """The norm of a sum, float32 inside, rounded, times the layer's weights, times a gate. No gradients.

    Args:
      terms: float, all of one dtype.
      norm: its weights in any float dtype.
      layer: int32 scalar, may be traced, 0 <= layer < L.
      gate: like a term.
      implementation: "auto" (the best that can run here), "xla" (portable) or "hopper" (one small kernel).

    Returns:
      [N,D] in the terms' dtype.

    Raises:
      ValueError: a shape or dtype that does not fit, an unknown implementation, or a named one that cannot run here.
    """
    check(terms, norm, layer)
    x = terms[0][0]
    if gate is not None and (gate.shape, gate.dtype) != (x.shape, x.dtype):
        raise ValueError(f"normed: gate must be {x.shape} {x.dtype}, got {gate.shape} {gate.dtype}")
    name = LADDER.choose(implementation, terms)
    return LADDER.module(name).normed(terms, norm, jnp.asarray(layer, jnp.int32), gate)


def check(terms: Sequence[Term], norm: Norm, layer: jax.Array | int) -> None:
    """Raises what the ops say they raise about terms, norm and layer."""
    x = terms[0][0]
    if x.ndim != 2 or any((a.shape, a.dtype) != (x.shape, x.dtype) for a, _ in terms):
        found = ", ".join(f"{a.shape} {a.dtype}" for a, _ in terms)
        raise ValueError(f"normed: terms must all be [N, D] of one dtype, got {found}")
    if norm.weights.ndim != 2 or norm.weights.shape[1] != x.shape[1]:
        raise ValueError(f"normed: the norm's weights must be [L, {x.shape[1]}], got {norm.weights.shape}")
    if is_known(layer) and not 0 <= layer < len(norm.weights):
        raise ValueError(f"normed: layer must be in 0..{len(norm.weights) - 1}, got {layer}")
