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
