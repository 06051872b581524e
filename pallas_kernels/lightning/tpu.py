"""Pallas TPU: a fused forward pass, a backward pass of two scans, and decode in place. See docs/kernels-tpu.md."""

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import target
from pallas_kernels.lightning import tpu_backward, tpu_decode, tpu_forward

SIZES = (64, 128)


def unsupported(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why these kernels cannot run for these arguments (prefill or decode), or None."""
    del k
    platform = target.target_platform()
    if platform != "tpu":
        return f"it needs a TPU, and this program is for {platform}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in SIZES:
        return f"its heads have size 64 or 128 (K = V): got K = {q.shape[-1]}, V = {v.shape[-1]}"
    return None


def forward(q, k, v, log_decay, initial_state, segment_ids, *, interpret: bool | pltpu.InterpretParams = False):
    """(o [B,T,H,V] in q's dtype, final_state [B,H,K,V] float32); arguments as in `lightning_attention`."""
    return tpu_forward.scan(q, k, v, log_decay, initial_state, segment_ids, interpret=interpret)


def backward(
    q,
    k,
    v,
    log_decay,
    initial_state,
    segment_ids,
    do,
    d_final_state,
    *,
    interpret: bool | pltpu.InterpretParams = False,
):
    """(dq, dk, dv in their inputs' dtypes, d_initial_state float32) for the gradients `do` and `d_final_state`.

    Nothing is kept from the forward pass. dq_t = do_t S_t^T is the forward scan itself with do, v, k in the places of
    q, k, v: its state then is S^T.
    """
    transposed = None if initial_state is None else initial_state.mT
    dq, _ = tpu_forward.scan(do, v, k, log_decay, transposed, segment_ids, interpret=interpret)
    return dq, *tpu_backward.scan(q, k, v, log_decay, segment_ids, do, d_final_state, interpret=interpret)


decode = tpu_decode.decode
