"""Softmax attention on Hopper, backward: one kernel for dq, one for dk and dv.

    p_ij = 2^(scale q_i k_j - lse_i)        dv_j = sum_i p_ij do_i
    ds_ij = p_ij (do_i v_j - delta_i)       dk_j = sum_i ds_ij q_i / sqrt(D)     dq_i = sum_j ds_ij k_j / sqrt(D)

with delta_i = do_i o_i. The weights are recomputed in both: seven products instead of five, but no block waits for
another, nothing is summed in memory, and the order of every sum is fixed. A thread block keeps 128 queries (or keys),
64 in each of two warpgroups, and walks through what they see (or what sees them), 64 at a time; a third warpgroup
drives the copy engine.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.softmax.hopper_tiles import HALF, LOG2_E, TILE, Bounds, key_walk, query_walk

BLOCK = 64  # keys (or queries) of a step
STAGES = 4


def queries(q, k, v, do, statistics, bounds: Bounds, *, interpret=False):
    """dq [B,T,Hq,D] bfloat16.

    Arguments as in `hopper_forward.forward`; do like q; statistics [B,Hq,2,T'] float32: lse and delta.
    """
    batch, _, heads, size = q.shape
    group_size = heads // k.shape[2]
    tiles = bounds.first.shape[1] // TILE
    scale = LOG2_E / math.sqrt(size)
    ops = _hopper.operations(interpret)

    def body(q_ref, k_ref, v_ref, do_ref, statistics_ref, first_ref, last_ref, offset_ref, dq_ref, *scratch):
        q_smem, do_smem, k_smem, v_smem, q_full, full, free = scratch
        head, row, group = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("group")
        tile = tiles - 1 - lax.axis_index("tile")
        walk = key_walk((first_ref, last_ref, offset_ref), row, tile, bounds.keys, BLOCK)

        def compute(half):
            mine = pl.ds(tile * TILE + half * HALF, HALF)
            plgpu.copy_gmem_to_smem(q_ref.at[row, mine, head], q_smem.at[half], q_full.at[half])
            plgpu.copy_gmem_to_smem(do_ref.at[row, mine, head], do_smem.at[half], q_full.at[half])
            for slot in range(STAGES):
                plgpu.barrier_arrive(free.at[slot])
            first = ops.load(first_ref.at[row, mine], rows=True)
            place = tile * TILE + half * HALF + offset_ref[row]
            last = jnp.minimum(ops.iota((HALF,), 0, rows=True) + place, bounds.keys - 1)
            lse = ops.load(statistics_ref.at[row, head, 0, mine], rows=True)
            delta = ops.load(statistics_ref.at[row, head, 1, mine], rows=True)
            plgpu.barrier_wait(q_full.at[half])

            def advance(step, dq, masked):
                slot = lax.rem(step, jnp.int32(STAGES))
                plgpu.barrier_wait(full.at[slot])

                def look(scores, products):
                    ops.wgmma(scores, q_smem.at[half], k_smem.at[slot], transpose_b=True)
                    ops.wgmma(products, do_smem.at[half], v_smem.at[slot], transpose_b=True)
                    s = ops.result(scores, in_flight=1)
                    p = jnp.exp2(s * scale - ops.down(lse, s.shape))
                    if masked:
                        key = ops.iota((HALF, BLOCK), 1)
                        start = walk.at(step) * BLOCK
                        seen = (key >= ops.down(first - start, s.shape)) & (key <= ops.down(last - start, s.shape))
                        p = jnp.where(seen, p, 0.0)
                    return (p * (ops.result(products) - ops.down(delta, s.shape))).astype(jnp.bfloat16)

                ds = ops.fresh(look, (HALF, BLOCK), (HALF, BLOCK))
                dq = ops.onto(dq, ds, k_smem.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return dq

            dq = lax.fori_loop(0, walk.open, functools.partial(advance, masked=False), ops.zeros((HALF, size)))
            end = walk.open + walk.masked
            dq = lax.fori_loop(walk.open, end, functools.partial(advance, masked=True), dq)
            q_smem[half] = (dq * size**-0.5).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[half], dq_ref.at[row, mine, head])
            plgpu.wait_smem_to_gmem(0)

        def produce():
            kv_head = lax.div(head, jnp.int32(group_size))

            @pl.loop(0, walk.open + walk.masked)
            def _(step):
                slot = lax.rem(step, jnp.int32(STAGES))
                block = pl.ds(walk.at(step) * BLOCK, BLOCK)
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(k_ref.at[row, block, kv_head], k_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[row, block, kv_head], v_smem.at[slot], full.at[slot])

            for slot in range(STAGES):
                plgpu.barrier_wait(free.at[slot])

        _roles(group, compute, produce)

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    return _call(
        body,
        (q, k, v, do, statistics, bounds.first, bounds.last, bounds.offset),
        [jax.ShapeDtypeStruct(q.shape, jnp.bfloat16)],
        [
            tiled((2, HALF, size)),
            tiled((2, HALF, size)),
            tiled((STAGES, BLOCK, size)),
            tiled((STAGES, BLOCK, size)),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(heads, tiles, batch),
        name="softmax_attention_dq",
        interpret=interpret,
    )[0]


def keys(q, k, v, do, statistics, bounds: Bounds, *, interpret=False):
    """dk, dv [B,S,Hkv,D] bfloat16; arguments as in `queries`."""
    batch, _, heads, size = q.shape
    kv_heads = k.shape[2]
    group_size = heads // kv_heads
    scale = LOG2_E / math.sqrt(size)
    ops = _hopper.operations(interpret)

    def body(q_ref, k_ref, v_ref, do_ref, statistics_ref, first_ref, last_ref, offset_ref, dk_ref, dv_ref, *scratch):
        k_smem, v_smem, q_smem, do_smem, statistics_smem, k_full, full, free = scratch
        kv_head, row, group = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("group")
        tile = lax.axis_index("tile")
        walk = query_walk((first_ref, last_ref, offset_ref), row, tile, BLOCK)
        open_steps, steps = walk.open * group_size, (walk.open + walk.masked) * group_size

        def visit(step):
            """The head of the group and the block of queries: one head after the other, blocks without mask first."""
            masked = step >= open_steps
            size_of_head = jnp.where(masked, walk.masked, walk.open)
            inside = jnp.where(masked, step - open_steps, step)
            head = lax.div(inside, size_of_head)
            return head, walk.at(inside - head * size_of_head + jnp.where(masked, walk.open, 0))

        def compute(half):
            mine = pl.ds(tile * TILE + half * HALF, HALF)
            plgpu.copy_gmem_to_smem(k_ref.at[row, mine, kv_head], k_smem.at[half], k_full.at[half])
            plgpu.copy_gmem_to_smem(v_ref.at[row, mine, kv_head], v_smem.at[half], k_full.at[half])
            for slot in range(STAGES):
                plgpu.barrier_arrive(free.at[slot])
            # The queries that see each key.
            first = ops.iota((HALF,), 0, rows=True) + (tile * TILE + half * HALF - offset_ref[row])
            last = ops.load(last_ref.at[row, mine], rows=True)
            plgpu.barrier_wait(k_full.at[half])

            def advance(step, carry, masked_block=None):
                dv, dk = carry
                slot = lax.rem(step, jnp.int32(STAGES))
                plgpu.barrier_wait(full.at[slot])
                shape = (HALF, BLOCK)

                def look(scores):
                    ops.wgmma(scores, k_smem.at[half], q_smem.at[slot], transpose_b=True)
                    return ops.result(scores)

                lse = ops.load(statistics_smem.at[slot, 0], columns=True)
                p = jnp.exp2(ops.fresh(look, shape) * scale - ops.along(lse, shape))
                if masked_block is not None:
                    query = ops.iota(shape, 1) + masked_block * BLOCK
                    seen = (query >= ops.down(first, shape)) & (query <= ops.down(last, shape))
                    p = jnp.where(seen, p, 0.0)

                delta = ops.along(ops.load(statistics_smem.at[slot, 1], columns=True), shape)
                ds = p * ops.onto(-delta, v_smem.at[half], do_smem.at[slot], transpose_b=True)

                def add(dv, dk):
                    ops.wgmma(dv, p.astype(jnp.bfloat16), do_smem.at[slot])
                    ops.wgmma(dk, ds.astype(jnp.bfloat16), q_smem.at[slot])

                dv, dk = ops.onto_each(add, dv, dk)
                plgpu.barrier_arrive(free.at[slot])
                return dv, dk

            def one_head(head, carry):
                done = open_steps + head * walk.masked

                def masked(index, carry):
                    return advance(done + index, carry, walk.at(walk.open + index))

                return lax.fori_loop(0, walk.masked, masked, carry)

            carry = ops.zeros((HALF, size)), ops.zeros((HALF, size))
            carry = lax.fori_loop(0, open_steps, advance, carry)
            dv, dk = lax.fori_loop(0, group_size, one_head, carry)
            k_smem[half] = (dk * size**-0.5).astype(jnp.bfloat16)
            v_smem[half] = dv.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem.at[half], dk_ref.at[row, mine, kv_head])
            plgpu.copy_smem_to_gmem(v_smem.at[half], dv_ref.at[row, mine, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def produce():
            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, jnp.int32(STAGES))
                head, block = visit(step)
                head = kv_head * group_size + head
                rows = pl.ds(block * BLOCK, BLOCK)
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(do_ref.at[row, rows, head], do_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(statistics_ref.at[row, head, :, rows], statistics_smem.at[slot], full.at[slot])

            for slot in range(STAGES):
                plgpu.barrier_wait(free.at[slot])

        _roles(group, compute, produce)

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    return _call(
        body,
        (q, k, v, do, statistics, bounds.first, bounds.last, bounds.offset),
        [jax.ShapeDtypeStruct(k.shape, jnp.bfloat16)] * 2,
        [
            tiled((2, HALF, size)),
            tiled((2, HALF, size)),
            tiled((STAGES, BLOCK, size)),
            tiled((STAGES, BLOCK, size)),
            plgpu.SMEM((STAGES, 2, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(kv_heads, bounds.last.shape[1] // TILE, batch),
        name="softmax_attention_dkv",
        interpret=interpret,
    )


def _roles(group, compute, produce):
    """Two warpgroups compute, the third drives the copy engine."""
    for half in range(2):

        @pl.when(group == half)
        def _(half=half):
            plgpu.set_max_registers(240, action="increase")
            compute(half)

    @pl.when(group == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        produce()


def _call(body, inputs, out_types, scratch_types, *, grid, name, interpret):
    outputs = plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=("head", "tile", "row"),
        num_threads=3,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    return [_compat.vary_over(x, axes) for x in outputs]
