"""The expert MLP for few tokens on a Hopper GPU (Pallas, Mosaic GPU): as fast as the weights come from memory.

Every expert in use takes all tokens, and those that did not choose it weigh nothing: no token is sorted or gathered, no
expert's rows are filled up, and the matrix units, which compute too much, still wait for memory. Channels of the
weights are the rows of all products, tokens the columns:

    up      h[i] = silu(w1 x^T) * (w3 x^T) * share[i]        for the i-th expert in use, [F,n]
    down    y^T = sum_i w2 h[i]                              one sum over the channels of all of them

Thread blocks stay for a whole product and take one item after another: 64 rows of w1 beside the same 64 of w3, or 128
of w2 and a part of the sum. One warpgroup multiplies; the other has the copy engine fill a ring of stages and runs
ahead into the next item. An expert that nobody chose costs nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper

TOKENS = 128
"""So many may be there."""
_DEPTH = 128
_MEMORY = 192 << 10  # Of the ring.


class Chosen(NamedTuple):
    """Which experts are in use, and by whom."""

    experts: jax.Array  # [E] int32, those in use first
    used: jax.Array  # [1] int32, how many there are
    share: jax.Array  # [E,N] float32, what each of them contributes to each token


def chosen(routes: jax.Array, weights: jax.Array, experts: int) -> Chosen:
    """Of `routes` and `weights` [N,k]; ids outside 0..experts-1 count for nothing."""
    index = jnp.arange(experts, dtype=jnp.int32)
    taken = (routes.reshape(-1, 1) == index).any(0)
    place = jnp.sum(taken & (index < index[:, None]), axis=1)
    active = jnp.sum(jnp.where(taken & (place == index[:, None]), index, 0), axis=1, dtype=jnp.int32)
    used = jnp.sum(taken, keepdims=True, dtype=jnp.int32)
    hit = (routes == active[:, None, None]) & (index < used)[:, None, None]
    return Chosen(active, used, jnp.sum(jnp.where(hit, weights.astype(jnp.float32), 0.0), axis=2))


def forward(
    x: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    w2: jax.Array,
    routes: jax.Array,
    weights: jax.Array,
    first: jax.Array,
    experts: int,
    *,
    interpret=False,
) -> jax.Array:
    """y [N,D] bfloat16 of x [N,D], N <= TOKENS.

    Args:
      w1, w3: [S,F,D] bfloat16 and w2 [S,D,F], of which S the experts first, first + 1, ... are these; D and F multiples
        of 128.
      routes, weights: [N,k], as in `api.expert_mlp`.
      first: int32 scalar.
      experts: how many these are.
    """
    tokens = x.shape[0]
    columns = -(-tokens // 64) * 64
    picked = chosen(routes, weights, experts)
    schedule = (picked.experts + first, picked.used)
    x = jnp.pad(x, ((0, columns - tokens), (0, 0)))
    share = jnp.pad(picked.share, ((0, 0), (0, columns - tokens)))
    hidden = _up(x, w1, w3, *schedule, share, interpret=interpret)
    parts = _down(hidden, w2, *schedule, interpret=interpret)
    return parts.sum(0).T[:tokens].astype(x.dtype)


def _up(x, w1, w3, experts, used, share, *, interpret):
    """[E,F,n] bfloat16: what goes into the second product, for the experts in use."""
    columns, depth = x.shape
    rows = w1.shape[1]
    tiles = rows // 64
    ops = _hopper.operations(interpret)

    def locate(refs, item):
        slot = lax.div(item, jnp.int32(tiles))
        row = lax.rem(item, jnp.int32(tiles)) * 64
        return (slot, refs[3][slot], row), depth // _DEPTH

    def fetch(refs, copy, place, step):
        _, expert, row = place
        inside = pl.ds(step * _DEPTH, _DEPTH)
        for half in range(2):
            copy.lhs(half, refs[1 + half].at[expert, pl.ds(row, 64), inside])
        copy.rhs(refs[0].at[:, inside])

    def finish(refs, place, products, buffer):
        slot, _, row = place
        up, gate = products
        share = ops.along(ops.load(refs[5].at[slot], columns=True), (64, columns))
        hidden = up / (1 + jnp.exp(-up)) * gate
        # Not a product with zero: what an expert makes of a token that is not its own may be infinite.
        hidden = jnp.where(share == 0, 0.0, hidden * share)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = hidden.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, refs[6].at[slot, pl.ds(row, 64)])

    return _stream(
        (x, w1, w3, experts, used, share),
        jax.ShapeDtypeStruct((experts.shape[0], rows, columns), jnp.bfloat16),
        columns=columns,
        items=lambda refs: refs[4][0] * tiles,
        locate=locate,
        fetch=fetch,
        finish=finish,
        rhs_shape=(columns, _DEPTH),
        transpose_rhs=True,
        name="few_tokens_up",
        interpret=interpret,
    )


def _down(hidden, w2, experts, used, *, interpret):
    """[parts,D,n] float32: their sum is y^T."""
    _, depth, columns = hidden.shape
    rows = w2.shape[1]
    tiles, chunks = rows // 128, depth // _DEPTH
    parts = _parts(tiles)

    def locate(refs, item):
        tile, part = lax.rem(item, jnp.int32(tiles)), lax.div(item, jnp.int32(tiles))
        total = refs[3][0] * chunks
        first, end = (lax.div(total * p, jnp.int32(parts)) for p in (part, part + 1))
        return (tile * 128, part, first), end - first

    def fetch(refs, copy, place, step):
        row, _, first = place
        slot = lax.div(first + step, jnp.int32(chunks))
        inside = pl.ds(lax.rem(first + step, jnp.int32(chunks)) * _DEPTH, _DEPTH)
        expert = refs[2][slot]
        for half in range(2):
            copy.lhs(half, refs[1].at[expert, pl.ds(row + 64 * half, 64), inside])
        copy.rhs(refs[0].at[slot, inside])

    def finish(refs, place, products, buffer):
        row, part, _ = place
        for half in range(2):
            refs[4][part, pl.ds(row + 64 * half, 64)] = products[half]

    return _stream(
        (hidden, w2, experts, used),
        jax.ShapeDtypeStruct((parts, rows, columns), jnp.float32),
        columns=columns,
        items=lambda refs: tiles * parts,
        locate=locate,
        fetch=fetch,
        finish=finish,
        rhs_shape=(_DEPTH, columns),
        transpose_rhs=False,
        name="few_tokens_down",
        interpret=interpret,
    )


def _parts(tiles: int) -> int:
    """Into how many parts a sum is cut, so that all multiprocessors are busy to the end."""

    def idle(parts):
        return -tiles * parts % _hopper.MULTIPROCESSORS / (tiles * parts)

    return min(range(1, 17), key=idle)


class _Copies:
    """Where the operands of a step go: a stage of the ring."""

    def __init__(self, lhs, rhs, full):
        self._lhs, self._rhs, self._full = lhs, rhs, full

    def lhs(self, half, source):
        plgpu.copy_gmem_to_smem(source, self._lhs.at[half], self._full)

    def rhs(self, source):
        plgpu.copy_gmem_to_smem(source, self._rhs, self._full)


def _stream(
    inputs,
    out_type,
    *,
    columns: int,
    items: Callable,
    locate: Callable,
    fetch: Callable,
    finish: Callable,
    rhs_shape: tuple[int, int],
    transpose_rhs: bool,
    name: str,
    interpret,
):
    """The kernel: two products [64,columns] an item, of two pieces of weights with the same right side.

    items(refs) says how many items there are; locate(refs, item) where one lies and how many steps it takes;
    fetch(refs, copies, place, step) brings what a step multiplies; finish(refs, place, products, buffer) does with the
    products what is to be done.
    """
    blocks = 2 if interpret else _hopper.MULTIPROCESSORS
    stages = _MEMORY // ((2 * 64 + columns) * _DEPTH * 2)

    def body(*refs):
        *refs, lhs_smem, rhs_smem, out_smem, full, empty = refs
        block, group = lax.axis_index("block"), lax.axis_index("group")
        mine = lax.div(items(refs) - block + blocks - 1, jnp.int32(blocks))

        def each(do):
            """do(place, steps, done) for each of this block's items; `done` steps were before it."""

            def one(index, done):
                place, steps = locate(refs, block + index * blocks)
                do(place, steps, done)
                return done + steps

            lax.fori_loop(0, mine, one, jnp.int32(0))

        def produce(place, steps, done):
            @pl.loop(0, steps)
            def _(step):
                stage = lax.rem(done + step, jnp.int32(stages))
                plgpu.barrier_wait(empty.at[stage])
                fetch(refs, _Copies(lhs_smem.at[stage], rhs_smem.at[stage], full.at[stage]), place, step)

        def compute(place, steps, done):
            def release(step):
                @pl.when(step >= 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(done + step, jnp.int32(stages))])

            def multiply(*accumulators):
                @pl.loop(0, steps)
                def _(step):
                    stage = lax.rem(done + step, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[stage])
                    b = rhs_smem.at[stage]
                    b = _compat.transposed(b) if transpose_rhs else b
                    for half, accumulator in enumerate(accumulators):
                        plgpu.wgmma(accumulator, lhs_smem.at[stage, half], b)
                    plgpu.wgmma_wait(2)  # Those of the step before are done.
                    release(step - 1)

                return [accumulator[...] for accumulator in accumulators]

            products = pl.run_scoped(multiply, *[plgpu.ACC((64, columns), jnp.float32)] * 2)
            release(steps - 1)
            finish(refs, place, products, out_smem)

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
            each(produce)

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    out = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            tiled((stages, 2, 64, _DEPTH)),
            tiled((stages, *rhs_shape)),
            tiled((64, columns)),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    return _compat.vary_over(out, _compat.varying_axes(*inputs))
