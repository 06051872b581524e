"""Grouped matrix products on a Hopper GPU (Pallas, Mosaic GPU): what the expert MLP there is made of.

    rows      out[r] = lhs[r] w[e(r)]             blocks of rows that belong to one expert each
    weights   out[e] = lhs[rows of e]^T rhs[rows of e]

Thread blocks stay for the whole product and take one tile after another: 128 rows, 64 for each of two warpgroups, by
256 columns, which may be 128 of one matrix beside the same 128 of another. A third warpgroup has the copy engine fill a
ring of stages, each 64 deep, and runs ahead into the next tile while this one is written out. Pairs of blocks that
fetch an operand for both were no faster (docs/kernels-experts.md).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper

TILE_ROWS = 128
"""Rows of a tile: those of an expert must fill whole tiles."""
_DEPTH = 64
_STAGES = 4
_PIECE = 64  # Columns that a warpgroup writes out at a time.
_TOGETHER = 16  # Tiles above each other that are taken side by side: their rows stay in the L2 cache.


def _width(columns: int) -> int:
    """Columns of a tile of a matrix that has so many."""
    return 256 if columns % 256 == 0 else 128


def rows_product(
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array],
    experts: jax.Array,
    used: jax.Array,
    *,
    transpose_rhs: bool,
    combine: Callable | None = None,
    outputs: int = 1,
    interpret=False,
) -> list[jax.Array]:
    """Every tile of rows times its expert's matrix.

    Args:
      lhs: [P,K] bfloat16, one or two; P a multiple of 128, K of 64.
      rhs: as many [E,K,N] bfloat16, or [E,N,K] if transpose_rhs; N a multiple of 128. The products of two pairs are
        added; or, with `combine`, one lhs is multiplied by both.
      experts: [P/128] int32, the expert of each tile of rows.
      used: [1] int32, how many tiles of rows there are. Nothing is written for those behind them.
      combine: what becomes of the two products of a tile, float32: (a, b) -> `outputs` arrays like them.

    Returns:
      `outputs` arrays [P,N] bfloat16, summed in float32.
    """
    length, depth = lhs[0].shape
    columns = rhs[0].shape[1 if transpose_rhs else 2]
    beside = 2 if combine else 1
    tile = 128 if combine else _width(columns)
    steps = depth // _DEPTH

    def locate(schedule, m, n):
        return (m * TILE_ROWS, schedule[0][m], n * tile), len(lhs) * steps

    def fetch(copies, lhs_refs, rhs_refs, place, step):
        first, expert, column = place
        across = pl.ds(column, tile)

        def pair(i, step):
            inside = pl.ds(step * _DEPTH, _DEPTH)
            copies.lhs(lambda half: lhs_refs[i].at[pl.ds(first + 64 * half, 64), inside])
            for j in range(beside):
                matrix = rhs_refs[i + j].at[expert]
                copies.rhs(j, matrix.at[across, inside] if transpose_rhs else matrix.at[inside, across])

        if len(lhs) == 1:
            pair(0, step)
        else:
            pl.when(step < steps)(lambda: pair(0, step))
            pl.when(step >= steps)(lambda: pair(1, step - steps))

    def destination(ref, place, half, column):
        first, _, start = place
        return ref.at[pl.ds(first + 64 * half, 64), pl.ds(start + column, _PIECE)]

    return _persistent(
        lhs,
        rhs,
        [experts, used],
        [jax.ShapeDtypeStruct((length, columns), jnp.bfloat16)] * outputs,
        down=lambda schedule: schedule[1][0],
        across=columns // tile,
        tile=tile,
        beside=beside,
        locate=locate,
        fetch=fetch,
        destination=destination,
        transpose_lhs=False,
        transpose_rhs=transpose_rhs,
        combine=combine or (lambda product: (product,)),
        name="expert_rows",
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames="interpret")  # traced and lowered once for all of a program's equal calls
def weights_product(
    lhs: jax.Array, rhs: jax.Array, first: jax.Array, count: jax.Array, *, interpret=False
) -> jax.Array:
    """For each expert the sum over its rows of lhs^T rhs: gradients of its weights.

    Args:
      lhs: [P,M] and rhs [P,N], bfloat16; M and N multiples of 128.
      first, count: [E] int32: expert e has the rows first[e] : first[e] + count[e], multiples of 64. None: zeros.

    Returns:
      [E,M,N] bfloat16, summed in float32.
    """
    experts, rows, columns = first.shape[0], lhs.shape[1], rhs.shape[1]
    tile = _width(columns)
    down = rows // TILE_ROWS

    def locate(schedule, m, n):
        expert, row = lax.div(m, jnp.int32(down)), lax.rem(m, jnp.int32(down)) * TILE_ROWS
        return (expert, schedule[0][expert], row, n * tile), lax.div(schedule[1][expert], jnp.int32(_DEPTH))

    def fetch(copies, lhs_refs, rhs_refs, place, step):
        _, start, row, column = place
        inside = pl.ds(start + step * _DEPTH, _DEPTH)
        copies.lhs(lambda half: lhs_refs[0].at[inside, pl.ds(row + 64 * half, 64)])
        copies.rhs(0, rhs_refs[0].at[inside, pl.ds(column, tile)])

    def destination(ref, place, half, column):
        expert, _, row, start = place
        return ref.at[expert, pl.ds(row + 64 * half, 64), pl.ds(start + column, _PIECE)]

    (out,) = _persistent(
        [lhs],
        [rhs],
        [first, count],
        [jax.ShapeDtypeStruct((experts, rows, columns), jnp.bfloat16)],
        down=lambda schedule: experts * down,
        across=columns // tile,
        tile=tile,
        beside=1,
        locate=locate,
        fetch=fetch,
        destination=destination,
        transpose_lhs=True,
        transpose_rhs=False,
        combine=lambda product: (product,),
        name="expert_weights",
        interpret=interpret,
    )
    return out


class _Copies:
    """Where the operands of a step go: a stage of the ring."""

    def __init__(self, lhs_smem, rhs_smem, full, stage):
        self._lhs, self._rhs, self._full = lhs_smem.at[stage], rhs_smem.at[stage], full.at[stage]

    def lhs(self, source):
        for half in range(2):
            plgpu.copy_gmem_to_smem(source(half), self._lhs.at[half], self._full)

    def rhs(self, index, source):
        plgpu.copy_gmem_to_smem(source, self._rhs.at[index], self._full)


def _persistent(
    lhs, rhs, schedule, out_types, *, down, across, tile, beside, locate, fetch, destination, transpose_lhs,
    transpose_rhs, combine, name, interpret
):  # fmt: skip
    """The kernel: all tiles, down(schedule) x across.

    locate(schedule, m, n) says where a tile lies and how many steps it takes; fetch(copies, lhs, rhs, place, step)
    brings what a step multiplies; destination(out, place, half, column) is where a piece of the result goes.
    """
    blocks = 2 if interpret else _hopper.MULTIPROCESSORS
    lhs_block = (_DEPTH, 64) if transpose_lhs else (64, _DEPTH)
    rhs_block = (tile, _DEPTH) if transpose_rhs else (_DEPTH, tile)

    def body(*refs):
        refs = list(refs)
        lhs_refs, rhs_refs, schedule_refs, out_refs = (
            [refs.pop(0) for _ in range(len(x))] for x in (lhs, rhs, schedule, out_types)
        )
        lhs_smem, rhs_smem, out_smem, full, empty = refs
        block, group = lax.axis_index("block"), lax.axis_index("group")
        high = down(schedule_refs)
        mine = lax.div(high * across - block + blocks - 1, jnp.int32(blocks))

        def tile_at(index):
            """What `locate` says of this block's index-th tile."""
            order = block + index * blocks
            first = lax.div(order, jnp.int32(_TOGETHER * across)) * _TOGETHER
            height = jnp.minimum(high - first, _TOGETHER)
            inside = order - first * across
            return locate(schedule_refs, first + lax.rem(inside, height), lax.div(inside, height))

        def produce():
            def one_tile(index, done):
                place, steps = tile_at(index)

                @pl.loop(0, steps)
                def _(step):
                    stage = lax.rem(done + step, jnp.int32(_STAGES))
                    plgpu.barrier_wait(empty.at[stage])
                    fetch(_Copies(lhs_smem, rhs_smem, full, stage), lhs_refs, rhs_refs, place, step)

                return done + steps

            lax.fori_loop(0, mine, one_tile, jnp.int32(0))

        def compute(half):
            for stage in range(_STAGES):
                plgpu.barrier_arrive(empty.at[stage])

            def one_tile(index, done):
                place, steps = tile_at(index)

                def release(step):
                    @pl.when(step >= 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(done + step, jnp.int32(_STAGES))])

                def multiply(*accumulators):
                    @pl.loop(0, steps)
                    def _(step):
                        stage = lax.rem(done + step, jnp.int32(_STAGES))
                        plgpu.barrier_wait(full.at[stage])
                        a = lhs_smem.at[stage, half]
                        a = _compat.transposed(a) if transpose_lhs else a
                        for accumulator, b in zip(accumulators, [rhs_smem.at[stage, j] for j in range(beside)]):
                            plgpu.wgmma(accumulator, a, _compat.transposed(b) if transpose_rhs else b)
                        plgpu.wgmma_wait(beside)  # Those of the step before are done.
                        release(step - 1)

                    return [accumulator[...] for accumulator in accumulators]

                products = pl.run_scoped(multiply, *[plgpu.ACC((64, tile), jnp.float32)] * beside)
                release(steps - 1)
                pieces = 0
                for ref, result in zip(out_refs, combine(*products), strict=True):
                    result = result.astype(jnp.bfloat16)
                    for column in range(0, tile, _PIECE):
                        buffer = out_smem.at[half, pieces % 2]
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        buffer[...] = result[:, column : column + _PIECE]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(buffer, destination(ref, place, half, column))
                        pieces += 1
                return done + steps

            lax.fori_loop(0, mine, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        for half in range(2):

            @pl.when(group == half)
            def _(half=half):
                plgpu.set_max_registers(232, action="increase")
                compute(half)

        @pl.when(group == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            produce()

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    inputs = (*lhs, *rhs, *schedule)
    outputs = plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=[
            tiled((_STAGES, 2, *lhs_block)),
            tiled((_STAGES, beside, *rhs_block)),
            tiled((2, 2, 64, _PIECE)),
            plgpu.Barrier(num_arrivals=2 + beside, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    return [_compat.vary_over(x, axes) for x in outputs]
