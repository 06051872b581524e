"""On a Hopper GPU (Pallas, Mosaic GPU): all projections of a layer in one kernel, weights read once, from their stacks.

Tokens are the rows of the product, filled up to 64 by the copy engine, channels its columns. A thread block takes some
channels of one projection and all tokens, one item after the other: one warpgroup multiplies, the other has the copy
engine fill a ring of stages and runs ahead into the next item.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.projections.api import Projection

TOKENS = 256
"""So many may be there."""
_MEMORY = 192 << 10  # Of the ring.
_ROWS = 64
_DEPTH = 128


def unsupported(x: jax.Array, projections: Sequence[Projection]) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.project`), or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    if x.dtype != jnp.bfloat16:
        return f"it takes bfloat16: the matrix units would quietly round {x.dtype} to TF32, about three digits"
    if not 1 <= len(x) <= TOKENS:
        return f"it takes 1 to {TOKENS} tokens: got {len(x)}"
    if x.shape[1] % _DEPTH:
        return f"it takes hidden sizes that are multiples of {_DEPTH}: got {x.shape[1]}"
    for weights, _, parts, width in projections:
        if weights.shape[1] % 64 or (parts > 1 and width is not None and width % 64):
            return f"it takes multiples of 64 channels: got {weights.shape[1]} in {parts} parts of {width}"
    return None


def project(x, projections: Sequence[Projection], layer, *, interpret=False) -> list[jax.Array]:
    """Arguments as in `api.project`."""
    tokens, channels = x.shape
    halves = -(-tokens // _ROWS)
    sizes = [p.weights.shape[1] for p in projections]
    # Narrow items where wide ones would leave half of the multiprocessors idle.
    columns = 64 if sum(sizes) // 64 > _hopper.MULTIPROCESSORS // 2 else 32
    items = sum(sizes) // columns
    blocks = 2 if interpret else min(items, _hopper.MULTIPROCESSORS)
    steps = channels // _DEPTH
    stages = _MEMORY // ((halves * _ROWS + columns) * _DEPTH * 2)
    shapes = [(tokens, p.weights.shape[1] // p.parts) for p in projections for _ in range(p.parts)]

    def body(x_ref, layer_ref, *refs):
        weights_refs, refs = refs[: len(projections)], refs[len(projections) :]
        out_refs, (x_smem, weights_smem, out_smem, full, empty) = refs[: len(shapes)], refs[len(shapes) :]
        block, group = lax.axis_index("block"), lax.axis_index("group")
        # Numbers that are known would have to lie inside; the copy engine fills up what lies behind the last token.
        begins = [jnp.minimum(block, 0) + half * _ROWS for half in range(halves)]

        def each(visit):
            """visit(projection, its first channel, how many steps were before) for each of this block's items."""

            @pl.loop(0, lax.div(items - 1 - block, jnp.int32(blocks)) + 1)
            def _(index):
                first = (block + index * blocks) * columns
                for number, size in enumerate(sizes):
                    begin = sum(sizes[:number])

                    @pl.when((first >= begin) & (first < begin + size))
                    def _(number=number, begin=begin):
                        visit(number, first - begin, index * steps)

        def fetch(number, first, done):
            @pl.loop(0, steps)
            def _(step):
                stage = lax.rem(done + step, jnp.int32(stages))
                inside = pl.ds(step * _DEPTH, _DEPTH)
                plgpu.barrier_wait(empty.at[stage])
                weights = weights_refs[number].at[layer_ref[0], pl.ds(first, columns), inside]
                plgpu.copy_gmem_to_smem(weights, weights_smem.at[stage], full.at[stage])
                for half, begin in enumerate(begins):
                    some = x_ref.at[pl.ds(begin, _ROWS), inside]
                    plgpu.copy_gmem_to_smem(some, x_smem.at[stage, half], full.at[stage])

        def compute(number, first, done):
            def multiply(*sums):
                @pl.loop(0, steps)
                def _(step):
                    stage = lax.rem(done + step, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[stage])
                    for half, total in enumerate(sums):
                        plgpu.wgmma(total, x_smem.at[stage, half], _compat.transposed(weights_smem.at[stage]))
                    plgpu.wgmma_wait(halves)  # Those of the step before are done.

                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(done + step - 1, jnp.int32(stages))])

                return [total[...] for total in sums]

            products = pl.run_scoped(multiply, *[plgpu.ACC((_ROWS, columns), jnp.float32)] * halves)
            plgpu.barrier_arrive(empty.at[lax.rem(done + steps - 1, jnp.int32(stages))])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            _, activation, parts, width = projections[number]
            for half, product in enumerate(products):
                out_smem[half] = _ACTIVATIONS[activation](product.astype(jnp.bfloat16).astype(jnp.float32)).astype(
                    jnp.bfloat16
                )
            plgpu.commit_smem()
            width = sizes[number] if width is None else width
            turn = lax.div(first, jnp.int32(width))
            inside = lax.div(turn, jnp.int32(parts)) * width + lax.rem(first, jnp.int32(width))
            before = sum(p.parts for p in projections[:number])
            for part in range(parts):

                @pl.when(lax.rem(turn, jnp.int32(parts)) == part)
                def _(part=part):
                    for half, begin in enumerate(begins):
                        place = out_refs[before + part].at[pl.ds(begin, _ROWS), pl.ds(inside, columns)]
                        plgpu.copy_smem_to_gmem(out_smem.at[half], place)

        @pl.when(group == 0)
        def _():
            plgpu.set_max_registers(240, action="increase")
            for stage in range(stages):
                plgpu.barrier_arrive(empty.at[stage])
            each(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == 1)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            each(fetch)
            for stage in range(stages):
                plgpu.barrier_wait(empty.at[stage])

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    narrow = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    inputs = (x, layer.reshape(1), *(p.weights for p in projections))
    outputs = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes],
        scratch_types=[
            tiled((stages, halves, _ROWS, _DEPTH)),
            tiled((stages, columns, _DEPTH)),
            plgpu.SMEM((halves, _ROWS, columns), jnp.bfloat16, transforms=narrow),
            plgpu.Barrier(num_arrivals=halves + 1, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="group",
        kernel_name="project",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    return [_compat.vary_over(out, axes) for out in outputs]


_ACTIVATIONS = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
}
