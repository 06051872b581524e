"""Softmax attention on Hopper, forward: a thread block takes 128 queries of one head and walks through their keys.

Two warpgroups compute, 64 queries each, a third drives the copy engine. The two take turns: while one has the matrix
units, the other computes exponentials.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.softmax.hopper_tiles import FLOOR, HALF, LOG2_E, TILE, Bounds, key_walk

BLOCK = 128  # keys of a step
STAGES = 2


def forward(q, k, v, bounds: Bounds, *, interpret=False):
    """o [B,T,Hq,D] bfloat16, and lse [B,Hq,T'] float32: the binary logarithm of each query's sum of 2^score.

    q [B,T,Hq,D], k and v [B,S,Hkv,D] bfloat16, T and S multiples of 8, D 64 or 128. Scores are in units of log 2.
    """
    batch, _, heads, size = q.shape
    group_size = heads // k.shape[2]
    tiles = bounds.first.shape[1] // TILE
    scale = LOG2_E / math.sqrt(size)
    ops = _hopper.operations(interpret)

    def body(q_ref, k_ref, v_ref, first_ref, last_ref, offset_ref, o_ref, lse_ref, *scratch):
        q_smem, k_smem, v_smem, q_full, k_full, v_full, k_free, v_free, turn = scratch
        head, row, group = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("group")
        tile = tiles - 1 - lax.axis_index("tile")  # those with most keys first
        walk = key_walk((first_ref, last_ref, offset_ref), row, tile, bounds.keys, BLOCK)

        def slot_of(step):
            return lax.rem(step, jnp.int32(STAGES))

        def pass_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute(half):
            queries = pl.ds(tile * TILE + half * HALF, HALF)
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem.at[half], q_full.at[half])
            for slot in range(STAGES):
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
            first = ops.load(first_ref.at[row, queries], rows=True)
            place = tile * TILE + half * HALF + offset_ref[row]
            last = jnp.minimum(ops.iota((HALF,), 0, rows=True) + place, bounds.keys - 1)
            plgpu.barrier_wait(q_full.at[half])

            def advance(step, carry, masked):
                acc, top, total = carry
                slot = slot_of(step)
                plgpu.barrier_wait(k_full.at[slot])

                def multiply(scores):
                    ops.wgmma(scores, q_smem.at[half], k_smem.at[slot], transpose_b=True)
                    pass_turn()
                    return ops.result(scores)

                s = ops.fresh(multiply, (HALF, BLOCK))
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    key = ops.iota((HALF, BLOCK), 1)
                    start = walk.at(step) * BLOCK
                    seen = (key >= ops.down(first - start, s.shape)) & (key <= ops.down(last - start, s.shape))
                    s = jnp.where(seen, s, -jnp.inf)
                new = jnp.maximum(top, s.max(axis=1) * scale)
                shrink = jnp.exp2(top - new)
                p = jnp.exp2(s * scale - ops.down(new, s.shape))
                acc = acc * ops.down(shrink, acc.shape)
                total = total * shrink + p.sum(axis=1)
                p = p.astype(jnp.bfloat16)
                acc, new, total, p = lax.optimization_barrier((acc, new, total, p))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)
                acc = ops.onto(acc, p, v_smem.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new, total

            if half == 1:
                pass_turn()
            carry = ops.zeros((HALF, size)), ops.zeros((HALF,), rows=True) + FLOOR, ops.zeros((HALF,), rows=True)
            carry = lax.fori_loop(0, walk.open, functools.partial(advance, masked=False), carry)
            carry = lax.fori_loop(walk.open, walk.open + walk.masked, functools.partial(advance, masked=True), carry)
            if half == 0:
                pass_turn()
            acc, top, total = carry
            nothing = total == 0.0
            o = acc * ops.down(jnp.where(nothing, 0.0, 1.0 / jnp.where(nothing, 1.0, total)), acc.shape)
            q_smem[half] = o.astype(jnp.bfloat16)
            ops.store(lse_ref.at[row, head, queries], top + jnp.log(jnp.where(nothing, 1.0, total)) * LOG2_E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[half], o_ref.at[row, queries, head])
            plgpu.wait_smem_to_gmem(0)

        def produce():
            kv_head = lax.div(head, jnp.int32(group_size))

            @pl.loop(0, walk.open + walk.masked)
            def _(step):
                slot = slot_of(step)
                keys = pl.ds(walk.at(step) * BLOCK, BLOCK)
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.copy_gmem_to_smem(k_ref.at[row, keys, kv_head], k_smem.at[slot], k_full.at[slot])
                plgpu.barrier_wait(v_free.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[row, keys, kv_head], v_smem.at[slot], v_full.at[slot])

            for slot in range(STAGES):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

        for half in range(2):

            @pl.when(group == half)
            def _(half=half):
                plgpu.set_max_registers(240, action="increase")
                compute(half)

        @pl.when(group == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            produce()

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    inputs = (q, k, v, bounds.first, bounds.last, bounds.offset)
    outputs = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, tiles * TILE), jnp.float32),
        ],
        scratch_types=[
            tiled((2, HALF, size)),
            tiled((STAGES, BLOCK, size)),
            tiled((STAGES, BLOCK, size)),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(heads, tiles, batch),
        grid_names=("head", "tile", "row"),
        num_threads=3,
        thread_name="group",
        kernel_name="softmax_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    return [_compat.vary_over(x, axes) for x in outputs]
