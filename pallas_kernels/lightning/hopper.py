"""Lightning attention on NVIDIA Hopper (H100, H200): fused scans in Pallas' Mosaic GPU dialect.

The gradient of lightning attention is lightning attention: with S_t = lam S_{t-1} + k_t^T v_t running forward and
G_t = lam G_{t+1} + q_t^T do_t running backward in time,

    o_t = q_t S_t        dq_t = do_t S_t^T        dv_t = k_t G_t        dk_t = v_t G_t^T

so one kernel (`hopper_scan`) is all there is: forward walks once (q, k, v); backward walks once forward in time as
(do, v, k) for dq, and once backward in time as (k, q, do) for dv and (v, do, q) for dk, both in one launch.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _hopper
from pallas_kernels.lightning import hopper_parts
from pallas_kernels.lightning.hopper_decode import decode
from pallas_kernels.lightning.hopper_scan import CHUNK, Role, scan
from pallas_kernels.lightning.segments import PADDING

__all__ = ["backward", "decode", "forward", "left_behind", "unsupported"]


def unsupported(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why this implementation cannot run for these arguments ([B,T,H,D], or [N,H,D] to decode), or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    if q.ndim == 4 and q.dtype != jnp.bfloat16:
        return f"it takes bfloat16: the matrix units would quietly round {q.dtype} to TF32, about three digits"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128):
        return f"it takes heads of size 64 or 128, keys and values alike: got K = {q.shape[-1]}, V = {v.shape[-1]}"
    return None


def forward(q, k, v, log_decay, initial_state, segment_ids, *, forget_below=0.0, interpret=False):
    """(o [B,T,H,V] bfloat16, final_state [B,H,K,V] float32); arguments as in `lightning_attention`."""
    length = q.shape[1]
    (q, k, v), segment_ids = _padded((q, k, v), segment_ids)
    parts = _parts(q, length, log_decay, segment_ids)
    options = {"forget_below": forget_below, "interpret": interpret}
    (o,), (states,) = scan(
        [parts.cut(x) for x in (q, k, v)],
        [Role(q=0, k=1, v=2, final=True)],
        log_decay,
        [parts.states_before(k, v, initial_state, **options)],
        parts.segment_ids,
        length=length // parts.count,
        reverse=False,
        splits=_splits(parts.cut(q)),
        interpret=interpret,
    )
    return parts.join(o)[:, :length], parts.last(states).mT


def backward(q, k, v, log_decay, initial_state, segment_ids, do, d_final_state, *, forget_below=0.0, interpret=False):
    """(dq, dk, dv bfloat16, d_initial_state float32) for the gradients `do` and `d_final_state`.

    States are recomputed: nothing is kept from forward but its arguments.
    """
    length = q.shape[1]
    (q, k, v, do), segment_ids = _padded((q, k, v, do), segment_ids)
    parts = _parts(q, length, log_decay, segment_ids)
    options = {"forget_below": forget_below, "interpret": interpret}
    before = parts.states_before(k, v, initial_state, **options)
    behind = parts.gradients_behind(q, do, d_final_state, **options)
    q, k, v, do = (parts.cut(x) for x in (q, k, v, do))
    (dq,), _ = scan(
        (do, v, k),
        [Role(q=0, k=1, v=2)],
        log_decay,
        [None if before is None else before.mT],
        parts.segment_ids,
        length=length // parts.count,
        reverse=False,
        splits=_splits(q),
        interpret=interpret,
    )
    (dv, dk), (gradients,) = scan(
        (q, k, v, do),
        [Role(q=1, k=0, v=3), Role(q=2, k=3, v=0, final=True)],
        log_decay,
        [behind, behind.mT],
        parts.segment_ids,
        length=length // parts.count,
        reverse=True,
        interpret=interpret,
    )
    dq, dk, dv = (parts.join(x)[:, :length] for x in (dq, dk, dv))
    return dq, dk, dv, parts.first(gradients)


def left_behind(k, v, log_decay, segment_ids, *, reverse, interpret=False):
    """`forward(...)[1]` of rows that begin with no state; `reverse`, of queries and gradients of outputs:
    `backward(...)[3]` where nothing comes from behind."""
    if segment_ids is None and k.shape[1] % CHUNK:
        segment_ids = jnp.zeros(k.shape[:2], jnp.int32)
    (k, v), segment_ids = _padded((k, v), segment_ids, CHUNK)
    parts = _parts(k, k.shape[1], log_decay, segment_ids)
    return parts.left_behind(k, v, reverse=reverse, forget_below=0.0, interpret=interpret).mT


def _parts(q, length, log_decay, segment_ids) -> hopper_parts.Parts:
    """How rows are cut where a walk per head, in two blocks, would leave most of the chip idle."""
    batch, _, heads, _ = q.shape
    return hopper_parts.Parts(log_decay, segment_ids, batch, length, 2 * heads)


def _splits(q) -> int:
    """How many blocks share a head: two where both halves of all heads find a multiprocessor at once."""
    batch, _, heads, size = q.shape
    return 2 if size == 128 and 2 * batch * heads <= _hopper.MULTIPROCESSORS else 1


def _padded(arrays, segment_ids, multiple=8):
    """With zeros behind the tokens up to a multiple: of 8, which the copy engine wants (a copy, if there are any)."""
    missing = -arrays[0].shape[1] % multiple
    if missing:
        arrays = [jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in arrays]
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, missing)), constant_values=PADDING)
    return arrays, segment_ids
