"""The scan from the right on TPU: dk, dv and the gradient of the initial state, in one pass over q, k, v, do."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import tpu_tiles as tiles


@functools.partial(jax.jit, static_argnames="interpret")
def scan(q, k, v, log_decay, segment_ids, do, d_final_state, *, interpret):
    """(dk, dv, d_initial_state); arguments as in `lightning_attention`, with K = V."""
    blocks = tiles.Blocks.of(q)
    token = blocks.token_spec(reverse=True)
    segments, segment_specs = (), ()
    if segment_ids is not None:
        segments = tiles.segment_arrays(blocks, segment_ids, reverse=True)
        segment_specs = blocks.segment_specs(reverse=True)
    rows = blocks.batch * blocks.length * blocks.heads
    dk, dv, d_initial = pl.pallas_call(
        functools.partial(_kernel, blocks),
        grid=blocks.grid,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *(token,) * 4, blocks.state_spec(), segment_specs],
        out_specs=(token, token, blocks.state_spec()),
        out_shape=(blocks.struct(k), blocks.struct(v), blocks.state_struct(q)),
        scratch_shapes=blocks.scratch(),
        compiler_params=tiles.compiler_params(),
        cost_estimate=pl.CostEstimate(
            flops=rows * 2 * blocks.size * (4 * tiles.CHUNK + 3 * blocks.size),
            transcendentals=0,
            bytes_accessed=6 * rows * blocks.size * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="lightning_attention_backward",
    )(blocks.per_head(log_decay), *map(blocks.flat, (q, k, v, do)), d_final_state, segments)
    return dk.reshape(k.shape), dv.reshape(v.shape), d_initial


def _kernel(blocks, log_decay, q, k, v, do, d_final, segments, dk, dv, d_initial, d_state, *tables):
    step = blocks.time(pl.program_id(2), reverse=True)
    weights = tiles.Weights(blocks, log_decay, *tables, *(segments or (None, None)))

    @pl.when(pl.program_id(2) == 0)
    def _():
        weights.fill(reverse=True)
        tiles.load_state(blocks, d_state, d_final)

    for chunk in reversed(range(blocks.chunks)):
        bounds = weights.chunk(chunk, step)
        visible = weights.visible(chunk)
        for tile in range(blocks.tiles):
            qc, kc, vc, doc = (tiles.load(blocks, x, chunk, tile, step) for x in (q, k, v, do))
            onto = weights.onto(tile, bounds)
            after = d_state[tile]
            # The scores are computed transposed (token j along rows, i along lanes), so that nothing else need be.
            scores, d_scores = [], []
            for i in range(blocks.heads_per_tile):
                within = weights.within(tile, i, visible)
                products = tiles.dot(tiles.of_head(blocks, kc, i), qc, (1, 1))
                d_products = tiles.dot(tiles.of_head(blocks, vc, i), doc, (1, 1))
                scores.append(tiles.rounded(blocks, products * within))
                d_scores.append(tiles.rounded(blocks, d_products * within))
            queries, d_outs = ([tiles.of_head(blocks, x, i) for i in range(blocks.heads_per_tile)] for x in (qc, doc))
            dvc = tiles.mix(scores, d_outs)
            dvc += onto * tiles.dot(kc, after.astype(q.dtype))
            dkc = tiles.mix(d_scores, queries)
            dkc += onto * tiles.dot(vc, after.astype(q.dtype), (1, 1))
            rows, lanes = pl.ds(chunk * tiles.CHUNK, tiles.CHUNK), pl.ds(tile * blocks.tile, blocks.tile)
            dk[0, rows, lanes] = weights.real(dkc, bounds).astype(dk.dtype)
            dv[0, rows, lanes] = weights.real(dvc, bounds).astype(dv.dtype)
            update = tiles.dot(tiles.scaled(qc, weights.into(tile, bounds)), doc, (0, 0))
            keep = weights.keep(tile, bounds, reverse=True)
            d_state[tile] = keep * after + tiles.block_diagonal(blocks, update)

    @pl.when(pl.program_id(2) == blocks.time_blocks - 1)
    def _():
        tiles.store_state(blocks, d_state, d_initial)
