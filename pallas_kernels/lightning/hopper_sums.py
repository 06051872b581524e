"""The states that the parts of a cut row leave to each other, on a Hopper GPU (Pallas, Mosaic GPU).

    forward in time:    sum_i lam^(n-1-i) k_i^T v_i        backward in time:    sum_i lam^(i+1) k_i^T v_i

over the n tokens of a part, of its last (first) segment alone. It is `hopper_scan` without outputs: a thread block owns
64 value columns of one head of one part. What no longer counts is not even read: a block begins as many tokens before
the end of its walk as its head remembers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.lightning import hopper_scan
from pallas_kernels.lightning.hopper_scan import CHUNK
from pallas_kernels.lightning.segments import is_real

_STAGES = 6
_WIDTH = 64  # Value columns of a block.


def remembered(log_decay: jax.Array, forget_below: float) -> jax.Array:
    """[H] float32: beyond so many tokens a weight is below forget_below, and in any case no normal float32."""
    tiny = float(jnp.finfo(jnp.float32).tiny)
    return jnp.log(max(forget_below, tiny)) / jnp.minimum(log_decay, -tiny)  # Never by zero: a head may keep all.


def state_sums(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    segment_ids: jax.Array | None,
    *,
    parts: int | None,
    reverse: bool,
    forget_below: float,
    interpret=False,
) -> jax.Array:
    """The decayed sum of k^T v over each part.

    Args:
      k, v: bfloat16 [B*parts,T,H,D], D in (64, 128), T a multiple of 64: rows of so many parts.
      log_decay: [H] float32.
      segment_ids: [B*parts,T] int32 as in `lightning_attention`, or None.
      parts: of every row all parts but the last (backward in time: the first) are summed; None: all parts are.
      reverse: walk from the last token to the first.
      forget_below: what has a smaller weight may be left out.

    Returns:
      [B*(parts-1),H,V,K] (None: [B*parts,...]) float32, transposed as `hopper_scan.scan` wants its states.
    """
    rows, length, heads, size = k.shape
    sums = rows if parts is None else rows // parts * (parts - 1)
    chunks = length // CHUNK
    metadata = None if segment_ids is None else hopper_scan.metadata(segment_ids, reverse)
    filled = jnp.full(rows, chunks) if segment_ids is None else -(-is_real(segment_ids).sum(1) // CHUNK)
    # A chunk more: the first one need not begin where the part does.
    needed = jnp.minimum(remembered(log_decay, forget_below) / CHUNK + 1, chunks).astype(jnp.int32) + 1
    steps = jnp.minimum(needed, filled[:, None]).astype(jnp.int32)
    begin = (steps - 1 if reverse else filled[:, None] - steps).astype(jnp.int32)
    inputs = (k, v, log_decay, begin, steps, *(() if metadata is None else (metadata,)))
    ops = _hopper.operations(interpret)

    def body(k_ref, v_ref, decay_ref, begin_ref, steps_ref, *refs):
        meta_ref = None if metadata is None else refs[0]
        out_ref, k_smem, v_smem, weighted_smem, meta_smem, full, empty = refs[-7:]
        half, head, place = lax.axis_index("half"), lax.axis_index("head"), lax.axis_index("sum")
        row = place if parts is None else place + lax.div(place, jnp.int32(parts - 1)) + int(reverse)
        columns = pl.ds(half * _WIDTH, _WIDTH)
        first, count = begin_ref[row, head], steps_ref[row, head]

        def chunk_of(step):
            return first - step if reverse else first + step

        @pl.when(lax.axis_index("group") == 0)
        def _():
            plgpu.set_max_registers(232, action="increase")
            log_lam = decay_ref[head]

            def advance(step, state):
                slot = lax.rem(step, jnp.int32(_STAGES))
                plgpu.barrier_wait(full.at[slot])
                n, bound = jnp.int32(CHUNK), None
                if meta_ref is not None:
                    n, bound = meta_smem[slot, CHUNK + 1], meta_smem[slot, CHUNK]
                weights, kept = hopper_scan.passing_on(ops, log_lam, chunk_of(step), n, bound, reverse)
                weighted = v_smem[slot].astype(jnp.float32) * ops.down(weights, (CHUNK, _WIDTH))
                weighted_smem[...] = weighted.astype(jnp.bfloat16)
                plgpu.commit_smem()
                state = ops.onto(kept * state, weighted_smem, k_smem.at[slot], transpose_a=True)
                plgpu.barrier_arrive(empty.at[slot])
                return state

            out_ref[place, head, columns] = lax.fori_loop(0, count, advance, ops.zeros((_WIDTH, size)))

        @pl.when(lax.axis_index("group") == 1)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, count)
            def _(step):
                slot = lax.rem(step, jnp.int32(_STAGES))

                @pl.when(step >= _STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                tokens = pl.ds(chunk_of(step) * CHUNK, CHUNK)
                plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, head], k_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[row, tokens, head, columns], v_smem.at[slot], full.at[slot])
                if meta_ref is not None:
                    plgpu.copy_gmem_to_smem(meta_ref.at[row, chunk_of(step)], meta_smem.at[slot], full.at[slot])

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((sums, heads, size, size), jnp.float32),
        scratch_types=[
            tiled((_STAGES, CHUNK, size)),
            tiled((_STAGES, CHUNK, _WIDTH)),
            tiled((CHUNK, _WIDTH)),
            plgpu.SMEM((_STAGES, hopper_scan.META), jnp.int32),
            plgpu.Barrier(num_arrivals=2 if metadata is None else 3, num_barriers=_STAGES),
            plgpu.Barrier(num_barriers=_STAGES),
        ],
        grid=(size // _WIDTH, heads, sums),
        grid_names=("half", "head", "sum"),
        num_threads=2,
        thread_name="group",
        kernel_name="lightning_attention_state_sums",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    return _compat.vary_over(out, _compat.varying_axes(*inputs))
