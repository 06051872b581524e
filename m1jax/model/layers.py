"""The small parts every layer shares: parameters, linear maps, RMSNorm, rotary positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int


def init_normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jax.typing.DTypeLike) -> nnx.Param:
    """A parameter of that shape drawn from N(0, std^2), the authors' initialisation of every matrix."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype))


def linear(x: Float[Array, "... inputs"], weight: Float[Array, "outputs inputs"]) -> Float[Array, "... outputs"]:
    """``x @ weight.T`` in x's dtype. Weights keep the checkpoint's orientation [out, in]."""
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def rms_norm(
    x: Float[Array, "... channels"], weight: Float[Array, " channels"], eps: float
) -> Float[Array, "... channels"]:
    """RMSNorm (Zhang & Sennrich 2019) as the authors round it: float32 inside, cast back, then times the weight."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


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
