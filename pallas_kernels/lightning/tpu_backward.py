"""The scan from the right on TPU: dk, dv and the gradient of the initial state, in one pass over q, k, v, do."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning import tpu_tiles as tiles


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
        span, rows = range(blocks.tiles), pl.ds(chunk * tiles.CHUNK, tiles.CHUNK)
        # As in the forward scan, each step for all tiles. The scores are transposed (token j along rows, i along
        # lanes), so that no product needs its first operand transposed but the last.
        qs, ks, vs, dos = ([tiles.load(blocks, x, chunk, t, step) for t in span] for x in (q, k, v, do))
        inside = [list(tiles.scores(blocks, weights, t, ks[t], qs[t], visible)) for t in span]
        d_inside = [list(tiles.scores(blocks, weights, t, vs[t], dos[t], visible)) for t in span]
        after = [d_state[t] for t in span]
        onto = [weights.onto(t, bounds) for t in span]
        dv_incoming = [onto[t] * tiles.dot(ks[t], after[t].astype(q.dtype)) for t in span]
        dk_incoming = [onto[t] * tiles.dot(vs[t], after[t].astype(q.dtype), (1, 1)) for t in span]
        updates = [tiles.dot(tiles.scaled(qs[t], weights.into(t, bounds)), dos[t], (0, 0)) for t in span]
        for t in span:
            lanes = pl.ds(t * blocks.tile, blocks.tile)
            dvc = tiles.mix(blocks, inside[t], dos[t]) + dv_incoming[t]
            dkc = tiles.mix(blocks, d_inside[t], qs[t]) + dk_incoming[t]
            dv[0, rows, lanes] = weights.real(dvc, bounds).astype(dv.dtype)
            dk[0, rows, lanes] = weights.real(dkc, bounds).astype(dk.dtype)
            keep = weights.keep(t, bounds, reverse=True)
            d_state[t] = keep * after[t] + tiles.block_diagonal(blocks, updates[t])

    @pl.when(pl.program_id(2) == blocks.time_blocks - 1)
    def _():
        tiles.store_state(blocks, d_state, d_initial)
