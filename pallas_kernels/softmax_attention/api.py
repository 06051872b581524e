"""The public op: arguments checked, implementation chosen."""

import jax

from pallas_kernels.softmax_attention import blocked, reference


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    q_start: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    if implementation == "reference":
        return reference.forward(q, k, v, segment_ids, q_start)
    if implementation in ("auto", "blocked"):
        return blocked.attention(q, k, v, segment_ids, q_start)
    raise ValueError(f"softmax_attention: unknown implementation {implementation!r}; known: auto, reference, blocked")
