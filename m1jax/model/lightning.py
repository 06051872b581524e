"""Lightning attention: linear attention with one fixed decay per head (report section 2.1; arXiv 2405.17381)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m1jax.config import ModelConfig
from m1jax.model.cache import LightningCache
from m1jax.model.layers import Call, Place, Weights, kept, linear, rms_norm
from m1jax.model.parallel import lightning_attention, project, project_back
from m1jax.sharding import constrain, constrain_residual
from pallas_kernels import Projection

NORM_EPS = 1e-6  # the authors' code gives this one norm its own epsilon, whatever config.rms_norm_eps says


def alibi_slopes(num_heads: int) -> np.ndarray:
    """ALiBi's slopes (Press et al. 2022), float64 [heads]: 2^(-8 (h+1) / H).

    Where H is no power of two: those of the power of two below, then every second one of the next.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8.0 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[: num_heads - power]])


def log_decays(config: ModelConfig) -> np.ndarray:
    """log lambda of every layer and head, float32 [layers, heads]; layers count among all layers, softmax included.

    Later layers decay more slowly: the slope is scaled by 1 - l / (L - 1) + 1e-5.
    """
    depth = np.arange(config.num_layers) / max(config.num_layers - 1, 1)
    return (-alibi_slopes(config.num_heads) * (1 - depth + 1e-5)[:, None]).astype(np.float32)


class LightningAttention(nnx.Module):
    """Parameters of a run of lightning layers, [layers, out, in], and the forward pass of one of them."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.num_heads = config.num_heads
        self.qkv_proj = nnx.Param(weights["attention", "qkv_proj"])
        self.output_gate = nnx.Param(weights["attention", "output_gate"])
        self.norm = nnx.Param(weights["attention", "norm"])
        self.out_proj = nnx.Param(weights["attention", "out_proj"])

    def __call__(
        self, x: Float[Array, "batch time hidden"], call: Call, place: Place, memory: LightningCache | None
    ) -> tuple[Float[Array, "batch time hidden"], LightningCache | None]:
        """S_t = lambda S_{t-1} + k_t^T v_t and o_t = q_t S_t; no positions and no 1/sqrt(d)."""
        batch, time, _ = x.shape
        x = constrain(x, "batch", "time", None)
        gate = None
        if self.qkv_proj[...].ndim == 2:
            qkv = jax.nn.silu(linear(x, self.qkv_proj[...]))
            q, k, v = jnp.split(qkv.reshape(batch, time, self.num_heads, -1), 3, axis=-1)
        else:  # those of all layers of the run
            q, k, v, gate = self._projected(x, place)
        if memory is None:
            out, _ = lightning_attention(q, k, v, place.log_decay, segment_ids=call.segment_ids)
            out = kept(out)
        else:
            out, memory = memory.attend(place.layer, q, k, v, place.log_decay, call.slots, call.segment_ids)
        out = rms_norm(out.reshape(batch, time, -1), self.norm[...], NORM_EPS)
        if gate is None:
            gate = jax.nn.sigmoid(linear(x, self.output_gate[...]))
        weight = self.out_proj[...]
        out = linear(out * gate, weight) if weight.ndim == 2 else project_back(out * gate, weight, place.layer)
        return constrain_residual(out), memory

    def _projected(self, x: Float[Array, "batch time hidden"], place: Place) -> tuple[jax.Array, ...]:
        """Queries, keys, values and gate, from weights that lie in their stacks."""
        stack = self.qkv_proj[...]
        qkv = Projection(stack, "silu", 3, stack.shape[1] // (3 * self.num_heads))
        *heads, gate = project(x, [qkv, Projection(self.output_gate[...], "sigmoid")], place.layer)
        return *(a.reshape(*x.shape[:2], self.num_heads, -1) for a in heads), gate
