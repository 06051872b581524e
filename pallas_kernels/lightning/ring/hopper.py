"""On a Hopper GPU (Pallas, Mosaic GPU): each state passes the chip once, in one direction.

The heads of all sequences are dealt to the multiprocessors, one thread block each. One warpgroup has the copy engine
bring a head's state and the tokens since into shared memory, a head or more ahead; the other computes its output in
float32, and writes the new token where it belongs. Where the tokens fill their place it also folds them into the
state, by the matrix units: keys are bfloat16 as they are, the weighted values are split into two bfloat16 numbers each,
which keeps 17 bits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.lightning import hopper

_TOKENS = 64  # Rows of a tile of the matrix units: no more tokens than these.
_ROWS = 64  # Of the state that are in registers at a time.
_FETCH = 8  # Tokens that are fetched at a time.


def unsupported(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array) -> str | None:
    """Why this implementation cannot run for these arguments (those of the op), or None."""
    reason = hopper.unsupported(q, k, v)
    if reason is not None:
        return reason
    if q.dtype != jnp.bfloat16:
        return f"it takes bfloat16: the matrix units would quietly round {q.dtype} to TF32, about three digits"
    if keys.shape[2] % _FETCH or keys.shape[2] > _TOKENS:
        return f"it takes room for a multiple of {_FETCH} tokens up to {_TOKENS}: got C = {keys.shape[2]}"
    return None


def decode(q, k, v, log_decay, pool, keys, values, counts, slots, *, interpret=False):
    """(o, pool, keys, values); arguments as in `lightning_attention_decode_ring`."""
    sequences, heads, size = q.shape
    capacity = keys.shape[2]
    groups = capacity // _FETCH
    items = sequences * heads
    blocks = min(items, 2 if interpret else _hopper.MULTIPROCESSORS)
    stages = 2 if size == 128 else 6
    ops = _hopper.operations(interpret)

    def body(
        q_ref, k_ref, v_ref, decay_ref, counts_ref, slots_ref, pool_ref, keys_ref, values_ref, o_ref,
        states, old_keys, old_values, queries, new_keys, new_values, rest, full, empty
    ):  # fmt: skip
        block, group = lax.axis_index("block"), lax.axis_index("group")
        share = lax.div(items - 1 - block, jnp.int32(blocks)) + 1

        def locate(index):
            """Sequence and head of this block's index-th item, its slot and its count."""
            item = block + index * blocks
            sequence, head = lax.div(item, jnp.int32(heads)), lax.rem(item, jnp.int32(heads))
            return sequence, head, slots_ref[sequence], counts_ref[sequence]

        def fetch(index):
            stage = lax.rem(index, jnp.int32(stages))
            sequence, head, slot, count = locate(index)
            plgpu.barrier_wait(empty.at[stage])
            plgpu.copy_gmem_to_smem(q_ref.at[sequence, head], queries.at[stage], full.at[stage])
            plgpu.copy_gmem_to_smem(k_ref.at[sequence, head], new_keys.at[stage], full.at[stage])
            plgpu.copy_gmem_to_smem(v_ref.at[sequence, head], new_values.at[stage], full.at[stage])

            def whether(needed, *copies):
                """The copies, or as many arrivals."""

                @pl.when(needed)
                def _():
                    for source, target in copies:
                        plgpu.copy_gmem_to_smem(source, target, full.at[stage])

                @pl.when(~needed)
                def _():
                    for _ in copies:
                        plgpu.barrier_arrive(full.at[stage])

            whether(slot >= 0, (pool_ref.at[slot, head], states.at[stage]))
            for place in range(groups):
                tokens = pl.ds(place * _FETCH, _FETCH)
                whether(
                    (slot >= 0) & (count > place * _FETCH),
                    (keys_ref.at[slot, head, tokens], old_keys.at[stage, tokens]),
                    (values_ref.at[slot, head, tokens], old_values.at[stage, tokens]),
                )

        def compute(index):
            stage = lax.rem(index, jnp.int32(stages))
            sequence, head, slot, count = locate(index)
            log_lam = decay_ref[head]
            plgpu.barrier_wait(full.at[stage])

            @pl.when(slot >= 0)
            def _():
                tile = (_TOKENS, size)
                row = ops.iota(tile, 0)
                token = ops.iota((_TOKENS,), 0, rows=True)

                def since(old, new):
                    """[tokens,size] float32: the old ones and the new one; zeros behind it."""
                    new = ops.along(ops.load(new.at[stage], columns=True).astype(jnp.float32), tile)
                    old = old[stage].astype(jnp.float32)
                    return jnp.where(row < count, old, jnp.where(row == count, new, 0.0))

                weights = jnp.exp(log_lam * jnp.maximum(count - token, 0).astype(jnp.float32))
                key, value = since(old_keys, new_keys), since(old_values, new_values)
                query = ops.load(queries.at[stage], columns=True).astype(jnp.float32)
                scores = (key * ops.along(query, tile)).sum(axis=1) * weights
                seen = ops.down(scores, tile) * value
                lam = jnp.exp(log_lam * (count + 1).astype(jnp.float32))
                for start in range(0, size, _ROWS):
                    rows = pl.ds(start, _ROWS)
                    part = ops.load(queries.at[stage, rows], rows=True).astype(jnp.float32) * lam
                    seen += ops.down(part, (_ROWS, size)) * states[stage, rows]
                ops.store(o_ref.at[sequence, head], seen.sum(axis=0).astype(o_ref.dtype))

                @pl.when(count < capacity - 1)
                def _():
                    for new, ref in ((new_keys, keys_ref), (new_values, values_ref)):
                        ops.store(ref.at[slot, head, count], ops.load(new.at[stage], columns=True))

                @pl.when(count == capacity - 1)
                def _():
                    old_keys[stage] = key.astype(jnp.bfloat16)
                    exact = ops.down(weights, tile) * value
                    rounded = exact.astype(jnp.bfloat16)
                    old_values[stage] = rounded
                    rest[...] = (exact - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    # lam^C - 1 keeps the digits that lam^C near 1 would lose, always to the same side.
                    loss = decay_ref[heads + head]
                    for start in range(0, size, _ROWS):
                        rows = pl.ds(start, _ROWS)
                        state = states[stage, rows]
                        state = state + loss * state
                        for weighted in (old_values.at[stage], rest):
                            state = ops.onto(state, old_keys.at[stage, :, rows], weighted, transpose_a=True)
                        states[stage, rows] = state
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(states.at[stage], pool_ref.at[slot, head])

            @pl.when(slot < 0)
            def _():
                ops.store(o_ref.at[sequence, head], ops.zeros((size,), o_ref.dtype, columns=True))

            # All four warps have come so far, and the engine has read what this item wrote: its stage is free.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            plgpu.barrier_arrive(empty.at[stage])

        @pl.when(group == 0)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            pl.loop(0, share)(fetch)

        @pl.when(group == 1)
        def _():
            plgpu.set_max_registers(232, action="increase")
            for stage in range(stages):
                plgpu.barrier_arrive(empty.at[stage])
            pl.loop(0, share)(compute)
            plgpu.wait_smem_to_gmem(0)

    def scoped(*refs):
        def tiled(*shape):
            return plgpu.SMEM(shape, q.dtype, transforms=_hopper.TILED)

        pl.run_scoped(
            lambda *scratch: body(*refs, *scratch),
            plgpu.SMEM(
                (stages, size, size),
                jnp.float32,
                transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
            ),
            tiled(stages, _TOKENS, size),
            tiled(stages, _TOKENS, size),
            *[plgpu.SMEM((stages, size), q.dtype)] * 3,
            tiled(_TOKENS, size),
            plgpu.Barrier(num_arrivals=4 + 2 * groups, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            collective_axes="group",
        )

    # In a shard_map of JAX 0.12 these want check_vma=False.
    pools = [jax.new_ref(x) for x in (pool, keys, values)]
    decay = jnp.concatenate([log_decay, jnp.expm1(log_decay * capacity)])
    o = pl.kernel(
        scoped,
        jax.ShapeDtypeStruct(v.shape, q.dtype, manual_axis_type=jax.typeof(q).manual_axis_type),
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",), num_threads=2, thread_name="group"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret) or False,
        name="lightning_attention_decode_ring",
    )(q, k, v, decay, counts, slots, *pools)
    return o, *(jax.freeze(x) for x in pools)
