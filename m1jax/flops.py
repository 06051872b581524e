"""Floating-point operations of M1: the one place that counts them (for MFU, the planner and the scaling figure).

A multiplication and an addition count as two. Counted: every matrix product, the recurrence of lightning attention and
the causal half of softmax attention; not counted: norms, activations, softmaxes, embedding look-up.
"""

from __future__ import annotations

from m1jax.config import LIGHTNING, ModelConfig


def parameters_per_token(config: ModelConfig) -> int:
    """Weights that multiply one token: projections, router, active experts and head (45.94 B + head for M1)."""
    hidden, inner = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    lightning = 5 * hidden * inner  # q, k, v, gate, out
    softmax = 2 * hidden * inner + 2 * hidden * kv
    experts = 3 * config.experts_per_token * hidden * config.intermediate_size + config.num_experts * hidden
    shared = 3 * hidden * config.shared_intermediate_size + hidden * bool(config.shared_intermediate_size)
    attention = sum(lightning if kind == LIGHTNING else softmax for kind in config.layer_types)
    return attention + config.num_layers * (experts + shared) + config.vocab_size * hidden


def attention_flops(config: ModelConfig, start: int, stop: int) -> int:
    """FLOPs of mixing positions ``start`` to ``stop`` of one sequence with all before them, all layers.

    Lightning: S += k^T v and o = q S, 4 d^2 per head and token, whatever came before. Softmax: q k^T and p v over the
    keys at and before each position, 4 d per head and pair.
    """
    tokens, d, heads = stop - start, config.head_dim, config.num_heads
    pairs = (stop * (stop + 1) - start * (start + 1)) // 2
    lightning = config.layer_types.count(LIGHTNING)
    return heads * (lightning * 4 * d * d * tokens + (config.num_layers - lightning) * 4 * d * pairs)


def forward_flops(config: ModelConfig, tokens: int, *, start: int = 0) -> int:
    """FLOPs to process ``tokens`` positions of one sequence from position ``start`` on, head included.

    Prefill, token-by-token decoding and the forward half of training cost the same; training costs three times this
    (four times with full rematerialisation).
    """
    return 2 * tokens * parameters_per_token(config) + attention_flops(config, start, start + tokens)


def training_flops(config: ModelConfig, tokens: float, pairs: float) -> float:
    """FLOPs of one update on packed sequences (nothing recomputed): forward once, backward twice.

    Args:
        config: the model's.
        tokens: in the batch, padding apart.
        pairs: of a token with itself and each token before it in its sequence, n (n + 1) / 2 for a sequence of n.
    """
    d, lightning = config.head_dim, config.layer_types.count(LIGHTNING)
    mixing = config.num_heads * 4 * d * (lightning * d * tokens + (config.num_layers - lightning) * pairs)
    return 3 * (2 * tokens * parameters_per_token(config) + mixing)


# Dense bfloat16 FLOP/s of one device, from the makers' data sheets, by the beginning of jax's `device_kind`.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H800": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device, or None where nobody has said (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)
