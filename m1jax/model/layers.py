"""The small parts every layer shares: what a call tells its layers, linear maps, RMSNorm, rotary positions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from m1jax.sharding import ambient_mesh
from pallas_kernels import target_platform
from pallas_kernels.kept import KEPT

FEW_TOKENS = 128  # from here on both orders are as fast


Weights = Mapping[tuple[str, ...], jax.Array]  # a block's parameters by their paths (``m1jax.parameters``)


class Call(NamedTuple):
    """What every layer of one forward pass shares.

    ``positions`` are those of the tokens in their sequences; ``segment_ids`` tells packed sequences apart and marks
    PADDING; ``slots`` and ``pages`` are the rows' of a ``Cache``.
    """

    positions: Int[Array, "batch time"]
    segment_ids: Int[Array, "batch time"] | None = None
    slots: Int[Array, " batch"] | None = None
    pages: Int[Array, "batch pages_of_row"] | None = None


class Place(NamedTuple):
    """What differs between the layers of a run: the layer's number in it, and its decays (or, where parameters are
    those of all layers, all decays)."""

    layer: int | Int[Array, ""]
    log_decay: Float[Array, "*layers heads"]


def linear(
    x: Float[Array, "... inputs"], weight: Float[Array, "outputs inputs"], precision: str | None = None
) -> Float[Array, "... outputs"]:
    """``x @ weight.T`` in x's dtype. Weights keep the checkpoint's orientation [out, in].

    For few tokens on CPU they stand on the left: XLA:CPU's library takes that side as it lies in memory and packs the
    other. Without the barrier XLA would swap the two.
    """
    weight, tokens = weight.astype(x.dtype), by_token(x)
    if ambient_mesh() is None and 1 < len(tokens) <= FEW_TOKENS and target_platform() == "cpu":
        product = jax.lax.optimization_barrier(jnp.einsum("oi,ti->ot", weight, tokens, precision=precision)).T
    else:
        product = jnp.einsum("...i,oi->...o", tokens, weight, precision=precision)
    return kept(product.reshape(*x.shape[:-1], len(weight)))


def kept(x: jax.Array) -> jax.Array:
    """x itself, marked as something not to be computed again."""
    return checkpoint_name(x, KEPT)


def by_token(x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
    """All tokens on one axis, for which XLA:CPU sums over tokens without transposing them first.

    Under a mesh, x itself: batch and time may be cut over axes of their own.
    """
    return x.reshape(-1, x.shape[-1]) if ambient_mesh() is None else x


def rms_norm(
    x: Float[Array, "... channels"], weight: Float[Array, " channels"], eps: float
) -> Float[Array, "... channels"]:
    """RMSNorm (Zhang & Sennrich 2019) as the authors round it: float32 inside, cast back, then times the weight."""
    return cast(jax.Array, _rms_norm(x, weight, eps))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return _rms_norm_forward(x, weight, eps)[0]


def _rms_norm_forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    inverse = apart(jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1) + eps))
    return (x32 * inverse[..., None]).astype(x.dtype) * weight.astype(x.dtype), (x, weight, inverse)


def _rms_norm_backward(eps: float, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both sums are products with a vector at hand, which XLA:CPU computes far faster than the reductions."""
    del eps
    x, weight, inverse = saved
    x32, dy32, weight32 = (a.astype(jnp.float32) for a in (x, dy, weight))
    product = dy32 * x32
    along = jnp.einsum("...c,c->...", product, weight32, precision="highest") * inverse**3 / x.shape[-1]
    dx = dy32 * weight32 * inverse[..., None] - x32 * along[..., None]
    per_token = by_token(inverse[..., None])[..., 0]
    dweight = jnp.tensordot(per_token, by_token(product), per_token.ndim, precision="highest")
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def apart(x: jax.Array) -> jax.Array:
    """x itself, but XLA:CPU's library of fused operations, which has no clamp, ends here.

    Given a whole chain from a norm's sum of squares to the next product, it computes the chain again for every tile of
    the product: the head on 8,192 tokens took 1.4 s instead of 0.2. On a GPU the clamp would keep XLA from computing a
    whole norm in one kernel.
    """
    return jax.lax.clamp(-jnp.inf, x, jnp.inf) if target_platform() == "cpu" else x


def rotary(
    x: Float[Array, "batch time heads channels"],
    positions: Int[Array, "batch time"],
    *,
    rotary_dim: int,
    theta: float,
) -> Float[Array, "batch time heads channels"]:
    """Rotary positions (Su et al. 2021) on the first ``rotary_dim`` channels, half-rotation (NeoX) layout.

    The frequencies are float32 from the first operation on, as the authors compute them: float64 frequencies cast
    afterwards would change cos by 3e-2 at position one million.
    """
    if rotary_dim == 0:
        return x
    angles = positions[..., None, None].astype(jnp.float32) * _inverse_frequencies(rotary_dim, theta)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second, rest = jnp.split(x, (rotary_dim // 2, rotary_dim), axis=-1)
    first32, second32 = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = (first32 * cos - second32 * sin, second32 * cos + first32 * sin)
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)


def _inverse_frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """theta^(-2i / rotary_dim), float32 [rotary_dim / 2]: each of the three operations rounded to float32."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    # Through float64, because numpy's own float32 power is off by an ulp where the authors' is rounded correctly.
    return np.float32(1.0) / np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)
