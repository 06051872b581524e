"""The expert MLP for few tokens on a Hopper GPU (Pallas, Mosaic GPU): as fast as the weights come from memory.

Every expert in use takes all tokens, and those that did not choose it weigh nothing: no token is sorted or gathered, no
expert's rows are filled up, and the matrix units, which compute too much, still wait for memory. Channels of the
weights are the rows of all products, tokens the columns:

    up      h[e] = silu(w1[e] x^T) * (w3[e] x^T) * share[e]      for every expert in use, [F,n]
    down    y^T = sum_e w2[e] h[e]                               one sum over the channels of all of them

Thread blocks stay for a whole product and take one item after another: 64 rows of w1 beside the same 64 of w3, or 128
of w2 and a part of the sum. One warpgroup multiplies; the other has the copy engine fill a ring of stages and runs
ahead into the next item. An expert that nobody chose costs nothing.
"""

import functools
from collections.abc import Callable

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


def forward(
    x: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    w2: jax.Array,
    routes: jax.Array,
    weights: jax.Array,
    layer: jax.Array,
    experts: int,
    *,
    interpret=False,
) -> jax.Array:
    """y [N,D] bfloat16 of x [N,D], N <= TOKENS.

    Args:
      w1, w3: [L*E,F,D] bfloat16 and w2 [L*E,D,F], D and F multiples of 128: the experts of all layers.
      routes, weights: [N,k], as in `api.expert_mlp`.
      layer: int32 scalar, 0 <= layer < L.
      experts: E.
    """
    tokens = x.shape[0]
    columns = -(-tokens // 64) * 64
    taken, share = chosen(routes, weights, experts)
    x = jnp.pad(x, ((0, columns - tokens), (0, 0)))
    share = jnp.pad(share, ((0, 0), (0, columns - tokens)))
    layer = layer.reshape(1)
    hidden = _up(x, w1, w3, taken, layer, share, interpret=interpret)
    parts = _down(hidden, w2, taken, layer, interpret=interpret)
    return parts.sum(0).T[:tokens].astype(x.dtype)


def chosen(routes: jax.Array, weights: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Whether anybody chose an expert, [E] int32 of 0 and 1; what it contributes to each token, [E,N] float32.

    `routes` and `weights` are [N,k]; ids outside 0..experts-1 count for nothing.
    """
    index = jnp.arange(experts)
    hit = routes == index[:, None, None]
    share = jnp.sum(jnp.where(hit, weights.astype(jnp.float32), 0.0), axis=2)
    return hit.any((1, 2)).astype(jnp.int32), share


def _up(x, w1, w3, taken, layer, share, *, interpret):
    """[E,F,n] bfloat16: what goes into the second product, for the experts in use."""
    columns, depth = x.shape
    experts, rows, steps = share.shape[0], w1.shape[1], depth // _DEPTH
    ops = _hopper.operations(interpret)

    def walk(refs, block, blocks, visit):
        """The tiles of one expert after the other are dealt to the blocks in turn."""
        tiles = rows // 64

        def expert(e, carry):
            done, next_block = carry
            first = lax.rem(block + blocks - next_block, jnp.int32(blocks))
            taken = refs[3][e]
            mine = taken * lax.div(jnp.maximum(tiles - first + blocks - 1, 0), jnp.int32(blocks))

            def tile(index, done):
                visit((e, (first + index * blocks) * 64), steps, done)
                return done + steps

            done = lax.fori_loop(0, mine, tile, done)
            return done, lax.rem(next_block + taken * tiles, jnp.int32(blocks))

        lax.fori_loop(0, experts, expert, (jnp.int32(0), jnp.int32(0)))

    def fetch(refs, place, steps, fill):
        expert, row = place
        matrix = refs[4][0] * experts + expert

        @pl.loop(0, steps)
        def _(step):
            inside = pl.ds(step * _DEPTH, _DEPTH)
            fill(step, *(ref.at[matrix, pl.ds(row, 64), inside] for ref in refs[1:3]), refs[0].at[:, inside])

    def finish(refs, place, products, buffer):
        expert, row = place
        up, gate = products
        share = ops.along(ops.load(refs[5].at[expert], columns=True), (64, columns))
        hidden = up / (1 + jnp.exp(-up)) * gate
        # Not a product with zero: what an expert makes of a token that is not its own may be infinite.
        hidden = jnp.where(share == 0, 0.0, hidden * share)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = hidden.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, refs[6].at[expert, pl.ds(row, 64)])

    return _stream(
        (x, w1, w3, taken, layer, share),
        jax.ShapeDtypeStruct((experts, rows, columns), jnp.bfloat16),
        columns=columns,
        walk=walk,
        fetch=fetch,
        finish=finish,
        rhs_shape=(columns, _DEPTH),
        transpose_rhs=True,
        name="expert_mlp_few_up",
        interpret=interpret,
    )


def _down(hidden, w2, taken, layer, *, interpret):
    """[parts,D,n] float32: their sum is y^T."""
    experts, depth, columns = hidden.shape
    rows, chunks = w2.shape[1], depth // _DEPTH
    tiles = rows // 128
    parts = _parts(tiles)

    def walk(refs, block, blocks, visit):
        total = sum(refs[2][e] for e in range(experts)) * chunks

        def item(index, done):
            place = block + index * blocks
            part = lax.div(place, jnp.int32(tiles))
            first, end = (lax.div(total * p, jnp.int32(parts)) for p in (part, part + 1))
            visit((lax.rem(place, jnp.int32(tiles)) * 128, part, first), end - first, done)
            return done + end - first

        lax.fori_loop(0, lax.div(tiles * parts - block + blocks - 1, jnp.int32(blocks)), item, jnp.int32(0))

    def fetch(refs, place, steps, fill):
        row, _, first = place

        def expert(e, begin):
            """The part's share of this expert's channels, which begin at step `begin` of the whole sum."""
            taken = refs[2][e]
            matrix = refs[3][0] * experts + e

            @pl.loop(jnp.maximum(first - begin, 0), taken * jnp.minimum(first + steps - begin, chunks))
            def _(chunk):
                inside = pl.ds(chunk * _DEPTH, _DEPTH)
                halves = (refs[1].at[matrix, pl.ds(row + 64 * half, 64), inside] for half in range(2))
                fill(begin + chunk - first, *halves, refs[0].at[e, inside])

            return begin + taken * chunks

        lax.fori_loop(0, experts, expert, jnp.int32(0))

    def finish(refs, place, products, buffer):
        row, part, _ = place
        for half in range(2):
            refs[4][part, pl.ds(row + 64 * half, 64)] = products[half]

    return _stream(
        (hidden, w2, taken, layer),
        jax.ShapeDtypeStruct((parts, rows, columns), jnp.float32),
        columns=columns,
        walk=walk,
        fetch=fetch,
        finish=finish,
        rhs_shape=(_DEPTH, columns),
        transpose_rhs=False,
        name="expert_mlp_few_down",
        interpret=interpret,
    )


def _parts(tiles: int) -> int:
    """Into how many parts a sum is cut, so that all multiprocessors are busy to the end."""

    def idle(parts):
        return -tiles * parts % _hopper.MULTIPROCESSORS / (tiles * parts)

    return min(range(1, 17), key=idle)


def _stream(
    inputs,
    out_type,
    *,
    columns: int,
    walk: Callable,
    fetch: Callable,
    finish: Callable,
    rhs_shape: tuple[int, int],
    transpose_rhs: bool,
    name: str,
    interpret,
):
    """The kernel: two products [64,columns] an item, of two pieces of weights with the same right side.

    walk(refs, block, blocks, visit) calls visit(place, steps, done) for each of a block's items; `done` steps were
    before it. fetch(refs, place, steps, fill) calls fill(step, lhs, lhs, rhs) with what each step multiplies;
    finish(refs, place, products, buffer) does with the products what is to be done.
    """
    blocks = 2 if interpret else _hopper.MULTIPROCESSORS
    stages = _MEMORY // ((2 * 64 + columns) * _DEPTH * 2)

    def body(*refs):
        *refs, lhs_smem, rhs_smem, out_smem, full, empty = refs
        block, group = lax.axis_index("block"), lax.axis_index("group")

        def produce(place, steps, done):
            def fill(step, first, second, rhs):
                stage = lax.rem(done + step, jnp.int32(stages))
                plgpu.barrier_wait(empty.at[stage])
                plgpu.copy_gmem_to_smem(first, lhs_smem.at[stage, 0], full.at[stage])
                plgpu.copy_gmem_to_smem(second, lhs_smem.at[stage, 1], full.at[stage])
                plgpu.copy_gmem_to_smem(rhs, rhs_smem.at[stage], full.at[stage])

            fetch(refs, place, steps, fill)

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
            walk(refs, block, blocks, compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == 1)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            walk(refs, block, blocks, produce)

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
