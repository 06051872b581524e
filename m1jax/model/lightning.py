"""Lightning attention: linear attention with one fixed decay per head (report section 2.1; arXiv 2405.17381)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m1jax.config import ModelConfig
from m1jax.model.cache import LightningCache
from m1jax.model.layers import init_normal, linear, rms_norm
from m1jax.model.parallel import lightning_attention, lightning_attention_decode
from m1jax.sharding import constrain
from pallas_kernels import PADDING

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
    """Parameters of one lightning layer per period, [periods, out, in], and its forward pass on one period's slice."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.num_heads = config.num_heads
        periods, hidden, inner = config.num_periods, config.hidden_size, config.num_heads * config.head_dim
        std = config.initializer_range
        self.qkv_proj = init_normal(rngs, (periods, 3 * inner, hidden), std, dtype)
        self.output_gate = init_normal(rngs, (periods, inner, hidden), std, dtype)
        self.norm = nnx.Param(jnp.ones((periods, inner), dtype))
        self.out_proj = init_normal(rngs, (periods, hidden, inner), std, dtype)

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        log_decay: Float[Array, " heads"],
        cache: LightningCache | None,
        segment_ids: Int[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time hidden"], LightningCache]:
        """S_t = lambda S_{t-1} + k_t^T v_t and o_t = q_t S_t; no positions and no 1/sqrt(d)."""
        batch, time, _ = x.shape
        x = constrain(x, "batch", "time", None)
        qkv = jax.nn.silu(linear(x, self.qkv_proj[...]))
        q, k, v = jnp.split(qkv.reshape(batch, time, self.num_heads, -1), 3, axis=-1)
        if cache is not None and time == 1:
            slots = None  # row b has state b, unless it is padding
            if segment_ids is not None:
                slots = jnp.where(segment_ids[:, 0] == PADDING, -1, jnp.arange(batch))
            out, state = lightning_attention_decode(q[:, 0], k[:, 0], v[:, 0], log_decay, cache.state, slots)
        else:
            initial = None if cache is None else cache.state
            out, state = lightning_attention(q, k, v, log_decay, initial_state=initial, segment_ids=segment_ids)
        out = rms_norm(out.reshape(batch, time, -1), self.norm[...], NORM_EPS)
        gate = jax.nn.sigmoid(linear(x, self.output_gate[...]))
        out = linear(out * gate, self.out_proj[...])
        return constrain(out, "batch", "residual", None), LightningCache(state)
