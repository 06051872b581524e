"""The public op: arguments checked, implementation chosen."""

import jax
import jax.numpy as jnp

from pallas_kernels.expert_mlp import ragged, reference


def expert_mlp(
    x: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    w2: jax.Array,
    routes: jax.Array,
    weights: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    _check(x, w1, w3, w2, routes, weights)
    if implementation == "reference":
        return reference.forward(x, w1, w3, w2, routes, weights)
    if implementation in ("auto", "ragged"):
        return ragged.forward(x, w1, w3, w2, routes, weights)
    raise ValueError(f"expert_mlp: unknown implementation {implementation!r}; known: auto, reference, ragged")


def _check(x, w1, w3, w2, routes, weights) -> None:
    if x.ndim != 2:
        raise ValueError(f"expert_mlp: x must be [N, D], got {x.shape}")
    if w1.ndim != 3 or w1.shape[2] != x.shape[1]:
        raise ValueError(f"expert_mlp: w1 must be [E, F, D] with D = {x.shape[1]}, got {w1.shape}")
    if w3.shape != w1.shape:
        raise ValueError(f"expert_mlp: w3 must have w1's shape {w1.shape}, got {w3.shape}")
    E, F, D = w1.shape
    if w2.shape != (E, D, F):
        raise ValueError(f"expert_mlp: w2 must be [E, D, F] = {(E, D, F)}, got {w2.shape}")
    if routes.ndim != 2 or routes.shape[0] != x.shape[0]:
        raise ValueError(f"expert_mlp: routes must be [N, k] with N = {x.shape[0]}, got {routes.shape}")
    if weights.shape != routes.shape:
        raise ValueError(f"expert_mlp: weights must have routes' shape {routes.shape}, got {weights.shape}")
    if not jnp.issubdtype(routes.dtype, jnp.integer):
        raise ValueError(f"expert_mlp: routes must be integers, got {routes.dtype}")
