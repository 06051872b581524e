"""One token for each of many sequences on a Hopper GPU (Pallas, Mosaic GPU): the states move through the chip once.

The work is cut into items: some value columns of one head of one sequence. Every multiprocessor has one thread block,
which goes through its share of the items. One warpgroup has the copy engine bring the items' part of the float32 state
[K,V] from its row of the pool into a ring in shared memory, several items ahead; the other advances it there, and the
copy engine takes it back to where it was. The output is the sum over K of q times the new state, all in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper

_WIDTH = 64  # Value columns of an item.
_ROWS = 64  # Rows of the state that are in registers at a time.


def decode(q, k, v, log_decay, pool, slots, layer=None, *, interpret=False):
    """(o [N,H,V] in q's dtype, pool [P,H,K,V] updated in place); arguments as in `lightning_attention_decode`.

    With a layer, log_decay is [L,H], and pool [L*P,H,K,V].
    """
    sequences, heads, size = q.shape
    log_decay = log_decay.reshape(-1, heads)
    rows = len(pool) // len(log_decay)
    layer = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1)
    parts = size // _WIDTH
    items = sequences * heads * parts
    blocks = min(items, _hopper.MULTIPROCESSORS)
    stages = 6 if size == 128 else 12  # 192 KB.
    ops = _hopper.operations(interpret)

    def body(
        q_ref,
        k_ref,
        v_ref,
        decay_ref,
        slots_ref,
        layer_ref,
        pool_ref,
        o_ref,
        states,
        queries,
        keys,
        values,
        full,
        empty,
    ):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        layer = layer_ref[0]
        share = lax.div(items - 1 - block, jnp.int32(blocks)) + 1

        def down(ref):
            """[rows] of q or k as a column beside every column of the state, in float32."""
            return ops.down(ops.load(ref, rows=True).astype(jnp.float32), (_ROWS, _WIDTH))

        def locate(index):
            """Sequence, head, columns and place in the pool of this block's index-th item."""
            item = block + index * blocks
            head = lax.rem(lax.div(item, jnp.int32(parts)), jnp.int32(heads))
            sequence = lax.div(item, jnp.int32(parts * heads))
            slot = slots_ref[sequence]
            place = jnp.where(slot < 0, slot, slot + layer * rows)
            return sequence, head, pl.ds(lax.rem(item, jnp.int32(parts)) * _WIDTH, _WIDTH), place

        @pl.when(group == 0)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, share)
            def _(index):
                stage = lax.rem(index, jnp.int32(stages))
                sequence, head, columns, slot = locate(index)

                @pl.when(index >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                plgpu.copy_gmem_to_smem(q_ref.at[sequence, head], queries.at[stage], full.at[stage])
                plgpu.copy_gmem_to_smem(k_ref.at[sequence, head], keys.at[stage], full.at[stage])
                plgpu.copy_gmem_to_smem(v_ref.at[sequence, head, columns], values.at[stage], full.at[stage])

                @pl.when(slot >= 0)
                def _():
                    plgpu.copy_gmem_to_smem(pool_ref.at[slot, head, :, columns], states.at[stage], full.at[stage])

                @pl.when(slot < 0)
                def _():
                    plgpu.barrier_arrive(full.at[stage])

        @pl.when(group == 1)
        def _():
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, share)
            def _(index):
                stage = lax.rem(index, jnp.int32(stages))
                sequence, head, columns, slot = locate(index)
                lam_minus_1 = decay_ref[layer, head]
                plgpu.barrier_wait(full.at[stage])

                @pl.when(slot >= 0)
                def _():
                    value = ops.load(values.at[stage], columns=True).astype(jnp.float32)
                    seen = ops.zeros((_ROWS, _WIDTH))
                    for start in range(0, size, _ROWS):
                        rows = pl.ds(start, _ROWS)
                        state = states[stage, rows]
                        update = down(keys.at[stage, rows]) * ops.along(value, (_ROWS, _WIDTH))
                        state = state + (lam_minus_1 * state + update)
                        states[stage, rows] = state
                        seen += down(queries.at[stage, rows]) * state
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(states.at[stage], pool_ref.at[slot, head, :, columns])
                    ops.store(o_ref.at[sequence, head, columns], seen.sum(axis=0).astype(o_ref.dtype))

                @pl.when(slot < 0)
                def _():
                    ops.store(o_ref.at[sequence, head, columns], ops.zeros((_WIDTH,), o_ref.dtype, columns=True))

                # Once the engine has read what this item wrote, its stage is free.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(empty.at[stage])

            plgpu.wait_smem_to_gmem(0)

    def scoped(*refs):
        tiled = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
        pl.run_scoped(
            lambda *scratch: body(*refs, *scratch),
            plgpu.SMEM((stages, size, _WIDTH), jnp.float32, transforms=tiled),
            plgpu.SMEM((stages, size), q.dtype),
            plgpu.SMEM((stages, size), q.dtype),
            plgpu.SMEM((stages, _WIDTH), q.dtype),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            collective_axes="group",
        )

    pool_ref = jax.new_ref(pool)  # In a shard_map of JAX 0.12 this wants check_vma=False.
    o = pl.kernel(
        scoped,
        jax.ShapeDtypeStruct(v.shape, q.dtype, manual_axis_type=jax.typeof(q).manual_axis_type),
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",), num_threads=2, thread_name="group"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret) or False,
        name="lightning_attention_decode",
    )(q, k, v, jnp.expm1(log_decay), slots, layer, pool_ref)  # lam itself, near 1, would lose digits step after step.
    return o, jax.freeze(pool_ref)
