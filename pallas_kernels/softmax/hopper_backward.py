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

        def slot_of(block):
            return lax.rem(block - walk.begin, jnp.int32(STAGES))

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

            def mask(block, ds):
                key = ops.iota(ds.shape, 1) + block * BLOCK
                return jnp.where((key >= ops.down(first, ds.shape)) & (key <= ops.down(last, ds.shape)), ds, 0.0)

            def advance(block, dq):
                slot = slot_of(block)
                plgpu.barrier_wait(full.at[slot])

                def look(scores, products):
                    ops.wgmma(scores, q_smem.at[half], k_smem.at[slot], transpose_b=True)
                    ops.wgmma(products, do_smem.at[half], v_smem.at[slot], transpose_b=True)
                    s = ops.result(scores, in_flight=1)
                    p = jnp.exp2(s * scale - ops.down(lse, s.shape))
                    return p * (ops.result(products) - ops.down(delta, s.shape))

                ds = ops.fresh(look, (HALF, BLOCK), (HALF, BLOCK))
                ds = lax.cond(walk.needs_mask(block), functools.partial(mask, block), lambda ds: ds, ds)
                dq = ops.onto(dq, ds.astype(jnp.bfloat16), k_smem.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return dq

            dq = lax.fori_loop(walk.begin, walk.end, advance, ops.zeros((HALF, size)))
            q_smem[half] = (dq * size**-0.5).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[half], dq_ref.at[row, mine, head])
            plgpu.wait_smem_to_gmem(0)

        def produce():
            kv_head = lax.div(head, jnp.int32(group_size))

            @pl.loop(walk.begin, walk.end)
            def _(block):
                slot = slot_of(block)
                rows = pl.ds(block * BLOCK, BLOCK)
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(k_ref.at[row, rows, kv_head], k_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[row, rows, kv_head], v_smem.at[slot], full.at[slot])

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

            def mask(block, p):
                query = ops.iota(p.shape, 1) + block * BLOCK
                return jnp.where((query >= ops.down(first, p.shape)) & (query <= ops.down(last, p.shape)), p, 0.0)

            def advance(head, block, carry):
                dv, dk = carry
                slot = lax.rem(head * walk.count + block - walk.begin, jnp.int32(STAGES))
                plgpu.barrier_wait(full.at[slot])
                shape = (HALF, BLOCK)

                def look(scores):
                    ops.wgmma(scores, k_smem.at[half], q_smem.at[slot], transpose_b=True)
                    return ops.result(scores)

                lse = ops.load(statistics_smem.at[slot, 0], columns=True)
                p = jnp.exp2(ops.fresh(look, shape) * scale - ops.along(lse, shape))
                p = lax.cond(walk.needs_mask(block), functools.partial(mask, block), lambda p: p, p)
                dv = ops.onto(dv, p.astype(jnp.bfloat16), do_smem.at[slot])
                delta = ops.along(ops.load(statistics_smem.at[slot, 1], columns=True), shape)
                ds = p * ops.onto(-delta, v_smem.at[half], do_smem.at[slot], transpose_b=True)
                dk = ops.onto(dk, ds.astype(jnp.bfloat16), q_smem.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return dv, dk

            def one_head(head, carry):
                return lax.fori_loop(walk.begin, walk.end, functools.partial(advance, head), carry)

            dv, dk = lax.fori_loop(0, group_size, one_head, (ops.zeros((HALF, size)), ops.zeros((HALF, size))))
            k_smem[half] = (dk * size**-0.5).astype(jnp.bfloat16)
            v_smem[half] = dv.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem.at[half], dk_ref.at[row, mine, kv_head])
            plgpu.copy_smem_to_gmem(v_smem.at[half], dv_ref.at[row, mine, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def produce():
            @pl.loop(0, walk.count * group_size)
            def _(step):
                slot = lax.rem(step, jnp.int32(STAGES))
                head = lax.div(step, walk.count)
                block = walk.begin + step - head * walk.count
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
