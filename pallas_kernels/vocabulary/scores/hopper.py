"""Scores on NVIDIA Hopper (H100, H200): float32 weights straight from memory into matrix units (Pallas, Mosaic GPU).

Words are the rows of the product, tokens its columns. Two warpgroups take 64 words each, split their weights in
registers into two float16 parts, and multiply both by the hidden states; a third has the copy engine fill a ring of
stages and runs ahead into the next words. Weights are read once for every COLUMNS tokens, and of those that are beside
each other in time, all but the first find them in the L2 cache.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.vocabulary.hopper import DEPTH, GROUP
from pallas_kernels.vocabulary.split import SCALE

WORDS = 128
HALF = 64
COLUMNS = 128
MEMORY = 144 << 10  # of the ring
FLOATS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def unsupported(hidden: jax.Array, weight: jax.Array) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.vocabulary_scores`), or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    if weight.dtype != jnp.float32:
        return f"it takes a float32 weight: got {weight.dtype}"
    if hidden.shape[1] % GROUP:
        return f"it takes hidden sizes that are multiples of {GROUP}: got {hidden.shape[1]}"
    if len(weight) % 8:
        return f"it takes numbers of words that are multiples of 8: got {len(weight)}"
    return None


def scores(hidden, weight, *, interpret=False) -> jax.Array:
    """Arguments as in `api.vocabulary_scores`."""
    count, depth = hidden.shape
    words = weight.shape[0]
    columns = 64 if count <= 64 else COLUMNS
    hidden = jnp.pad(hidden, ((0, -count % columns), (0, 0))).astype(jnp.float16)
    across = len(hidden) // columns
    items = pl.cdiv(words, WORDS) * across
    blocks = 2 if interpret else min(items, _hopper.MULTIPROCESSORS)
    steps = depth // DEPTH
    stages = MEMORY // (4 * WORDS * DEPTH + 2 * columns * DEPTH)
    ops = _hopper.operations(interpret)

    def body(hidden_ref, weight_ref, out_ref, hidden_smem, weight_smem, out_smem, full, free):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        mine = lax.div(items - block + blocks - 1, jnp.int32(blocks))

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        def place(index):
            """The first word and the first token of this block's index-th item."""
            item = block + index * blocks
            word = lax.div(item, jnp.int32(across))
            return word * WORDS, (item - word * across) * columns

        def compute(half):
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])

            def some_channels(first, sums):
                """Adds the products of GROUP channels, from stage number `first` on."""

                def multiply(acc):
                    for step in range(GROUP // DEPTH):
                        slot = slot_of(first + step)
                        plgpu.barrier_wait(full.at[slot])
                        scaled = ops.load(weight_smem.at[slot, half]) * SCALE
                        high = scaled.astype(jnp.float16)
                        low = (scaled - high.astype(jnp.float32)).astype(jnp.float16)
                        ops.wgmma(acc, low, hidden_smem.at[slot], transpose_b=True)
                        ops.wgmma(acc, high, hidden_smem.at[slot], transpose_b=True)
                        if step:
                            ops.wait(2)  # Those of the stage before are done.
                            plgpu.barrier_arrive(free.at[slot_of(first + step - 1)])
                    return ops.result(acc)

                sums = sums + ops.fresh(multiply, (HALF, columns))
                plgpu.barrier_arrive(free.at[slot_of(first + GROUP // DEPTH - 1)])
                return sums

            @pl.loop(0, mine)
            def _(index):
                word, token = place(index)
                sums = lax.fori_loop(
                    0,
                    depth // GROUP,
                    lambda i, sums: some_channels(index * steps + i * (GROUP // DEPTH), sums),
                    ops.zeros((HALF, columns)),
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[half] = sums / SCALE
                plgpu.commit_smem()
                rows = pl.ds(word + half * HALF, HALF)
                plgpu.copy_smem_to_gmem(out_smem.at[half], out_ref.at[rows, pl.ds(token, columns)])

            plgpu.wait_smem_to_gmem(0)

        def produce():
            @pl.loop(0, mine * steps)
            def _(step):
                slot = slot_of(step)
                index = lax.div(step, jnp.int32(steps))
                word, token = place(index)
                channels = pl.ds((step - index * steps) * DEPTH, DEPTH)
                plgpu.barrier_wait(free.at[slot])
                for half in range(2):
                    rows = pl.ds(word + half * HALF, HALF)
                    plgpu.copy_gmem_to_smem(weight_ref.at[rows, channels], weight_smem.at[slot, half], full.at[slot])
                tokens = pl.ds(token, columns)
                plgpu.copy_gmem_to_smem(hidden_ref.at[tokens, channels], hidden_smem.at[slot], full.at[slot])

            for slot in range(stages):
                plgpu.barrier_wait(free.at[slot])

        for half in range(2):

            @pl.when(group == half)
            def _(half=half):
                plgpu.set_max_registers(240, action="increase")
                compute(half)

        @pl.when(group == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            produce()

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((words, len(hidden)), jnp.float32),
        scratch_types=[
            plgpu.SMEM((stages, columns, DEPTH), jnp.float16, transforms=_hopper.TILED),
            plgpu.SMEM((stages, 2, HALF, DEPTH), jnp.float32, transforms=FLOATS),
            plgpu.SMEM((2, HALF, columns), jnp.float32, transforms=FLOATS),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        kernel_name="vocabulary_scores",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(hidden, weight)
    return _compat.vary_over(out, _compat.varying_axes(hidden, weight)).T[:count]
