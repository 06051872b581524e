"""Statistics on NVIDIA Hopper (H100, H200): products and softmax in one kernel (Pallas, Mosaic GPU), which
writes scores only where they are to be kept.

A thread block takes 128 tokens, 64 for each of two warpgroups, and goes through a part of the vocabulary, WORDS words
at a time; a third warpgroup has the copy engine fill a ring of stages. The matrix units round every sum down: over the
whole depth that would cost float32 four bits. So they sum over GROUP channels only, and these sums are added in
registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.vocabulary.split import SCALE, split
from pallas_kernels.vocabulary.statistics import Statistics

TOKENS = 128
HALF = 64
WORDS = 128
PIECE = 64  # words whose scores become weights at a time: more would not fit into registers
DEPTH = 64  # channels of a stage
STAGES = 4
GROUP = 128  # channels that matrix units sum over
PARTS = 8  # of the vocabulary: so many blocks read the same hidden states at once, and they stay in the L2 cache
FLOOR = -1e30  # start of the running maximum: finite, else there is nothing to subtract from it


def unsupported(hidden: jax.Array, weight: jax.Array) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.vocabulary_statistics`), or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    if hidden.shape[1] % GROUP:
        return f"it takes hidden sizes that are multiples of {GROUP}: got {hidden.shape[1]}"
    return None


def statistics(
    hidden, weight, targets, scale, keep_scores=False, *, interpret=False
) -> tuple[Statistics, jax.Array | None]:
    """Arguments as in `api.vocabulary_statistics`."""
    count, depth = hidden.shape
    words = weight.shape[0]
    high, low = split(jnp.pad(weight, ((0, -words % 8), (0, 0))))
    missing = -count % TOKENS
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).astype(high.dtype)
    targets = jnp.pad(targets, (0, missing))
    token_tiles, word_tiles = len(hidden) // TOKENS, pl.cdiv(words, WORDS)
    parts = min(word_tiles, max(PARTS, pl.cdiv(2 * _hopper.MULTIPROCESSORS, token_tiles)))
    per_part = pl.cdiv(word_tiles, parts)
    parts = pl.cdiv(word_tiles, per_part)
    steps = depth // DEPTH
    ops = _hopper.operations(interpret)

    def body(hidden_ref, high_ref, low_ref, targets_ref, scale_ref, out_ref, *refs):
        *kept, hidden_smem, high_smem, low_smem, full, free = refs
        part, tile, group = lax.axis_index("part"), lax.axis_index("tile"), lax.axis_index("group")
        begin = part * per_part
        mine = jnp.minimum(word_tiles - begin, per_part)

        def slot_of(step):
            return lax.rem(step, jnp.int32(STAGES))

        def compute(half):
            for slot in range(STAGES):
                plgpu.barrier_arrive(free.at[slot])
            tokens = pl.ds(tile * TOKENS + half * HALF, HALF)
            target = ops.load(targets_ref.at[tokens], rows=True)
            to_score = scale_ref[0] / SCALE

            def release(step):
                plgpu.barrier_arrive(free.at[slot_of(step)])

            def some_channels(first, sums):
                """Adds the products of GROUP channels, from stage number `first` on."""

                def multiply(acc):
                    for step in range(GROUP // DEPTH):
                        slot = slot_of(first + step)
                        plgpu.barrier_wait(full.at[slot])
                        ops.wgmma(acc, hidden_smem.at[slot, half], low_smem.at[slot], transpose_b=True)
                        ops.wgmma(acc, hidden_smem.at[slot, half], high_smem.at[slot], transpose_b=True)
                        if step:
                            ops.wait(2)  # Those of the stage before are done.
                            release(first + step - 1)
                    return ops.result(acc)

                sums = sums + ops.fresh(multiply, (HALF, WORDS))
                release(first + GROUP // DEPTH - 1)
                return sums

            def update(found, scores, first):
                """With the scores of some more words, from number `first` on."""
                top, mass, weighted, chosen = found
                word = ops.iota(scores.shape, 1) + first
                seen = scores
                if words % WORDS:  # zeros, as the copy engine finds none there: they count for nothing
                    seen = jnp.where(word < words, scores, FLOOR)
                new = jnp.maximum(top, seen.max(axis=1))
                shrink = jnp.exp(top - new)
                weights = jnp.exp(seen - ops.down(new, seen.shape))
                mass = mass * shrink + weights.sum(axis=1)
                weighted = weighted * shrink + (weights * scores).sum(axis=1)
                chosen = chosen + jnp.where(word == ops.down(target, scores.shape), scores, 0.0).sum(axis=1)
                return new, mass, weighted, chosen

            def some_words(index, found):
                sums = lax.fori_loop(
                    0,
                    depth // GROUP,
                    lambda i, sums: some_channels(index * steps + i * (GROUP // DEPTH), sums),
                    ops.zeros((HALF, WORDS)),
                )
                for column in range(0, WORDS, PIECE):
                    scores = sums[:, column : column + PIECE] * to_score
                    first = (begin + index) * WORDS + column
                    for ref in kept:
                        ref[tokens, pl.ds(first, PIECE)] = scores
                    found = update(found, scores, first)
                return found

            zeros = ops.zeros((HALF,), rows=True)
            found = lax.fori_loop(0, mine, some_words, (zeros + FLOOR, zeros, zeros, zeros))
            for place, value in enumerate(found):
                ops.store(out_ref.at[place, part, tokens], value)

        def produce():
            @pl.loop(0, mine * steps)
            def _(step):
                slot = slot_of(step)
                word = pl.ds((begin + lax.div(step, jnp.int32(steps))) * WORDS, WORDS)
                channels = pl.ds(lax.rem(step, jnp.int32(steps)) * DEPTH, DEPTH)
                plgpu.barrier_wait(free.at[slot])
                for half in range(2):
                    tokens = pl.ds(tile * TOKENS + half * HALF, HALF)
                    plgpu.copy_gmem_to_smem(hidden_ref.at[tokens, channels], hidden_smem.at[slot, half], full.at[slot])
                plgpu.copy_gmem_to_smem(low_ref.at[word, channels], low_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(high_ref.at[word, channels], high_smem.at[slot], full.at[slot])

            for slot in range(STAGES):
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

    tiled = functools.partial(plgpu.SMEM, dtype=high.dtype, transforms=_hopper.TILED)
    inputs = (hidden, high, low, targets, scale.reshape(1))
    kept = [jax.ShapeDtypeStruct((len(hidden), word_tiles * WORDS), jnp.float32)] if keep_scores else []
    out = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((4, parts, len(hidden)), jnp.float32), *kept],
        scratch_types=[
            tiled((STAGES, 2, HALF, DEPTH)),
            tiled((STAGES, WORDS, DEPTH)),
            tiled((STAGES, WORDS, DEPTH)),
            plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(parts, token_tiles),
        grid_names=("part", "tile"),
        num_threads=3,
        thread_name="group",
        kernel_name="vocabulary_statistics",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    out, *kept = (_compat.vary_over(x, _compat.varying_axes(*inputs)) for x in out)
    return Statistics(*out[:, :, :count]).together(axis=0), kept[0][:count, :words] if keep_scores else None
