"""The scan from the left on TPU: one pass over q, k, v; the state never leaves VMEM."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning import tpu_tiles as tiles


@functools.partial(jax.jit, static_argnames="interpret")
def scan(q, k, v, log_decay, initial_state, segment_ids, *, interpret):
    """(o, final_state); arguments as in `lightning_attention`, with K = V."""
    blocks = tiles.Blocks.of(q)
    token = blocks.token_spec(reverse=False)
    segments, segment_specs = (), ()
    if segment_ids is not None:
        segments = tiles.segment_arrays(blocks, segment_ids, reverse=False)
        segment_specs = blocks.segment_specs(reverse=False)
    initial = () if initial_state is None else (initial_state,)
    rows = blocks.batch * blocks.length * blocks.heads
    o, final = pl.pallas_call(
        functools.partial(_kernel, blocks),
        grid=blocks.grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(token,) * 3,
            segment_specs,
            (blocks.state_spec(),) * len(initial),
        ],
        out_specs=(token, blocks.state_spec()),
        out_shape=(blocks.struct(q), blocks.state_struct(q)),
        scratch_shapes=blocks.scratch(),
        compiler_params=tiles.compiler_params(),
        cost_estimate=pl.CostEstimate(
            flops=rows * 4 * blocks.size * (tiles.CHUNK + blocks.size),
            transcendentals=0,
            bytes_accessed=4 * rows * blocks.size * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="lightning_attention_forward",
    )(blocks.per_head(log_decay), *map(blocks.flat, (q, k, v)), segments, initial)
    return o.reshape(q.shape), final


def _kernel(blocks, log_decay, q, k, v, segments, initial, o, final, state, *tables):
    step = pl.program_id(2)
    weights = tiles.Weights(blocks, log_decay, *tables, *(segments or (None, None)))

    @pl.when(step == 0)
    def _():
        weights.fill(reverse=False)
        tiles.load_state(blocks, state, initial[0] if initial else None)

    for chunk in range(blocks.chunks):
        bounds = weights.chunk(chunk, step)
        visible = weights.visible(chunk)
        span, rows = range(blocks.tiles), pl.ds(chunk * tiles.CHUNK, tiles.CHUNK)
        # Each step for all tiles before the next step: the compiler's scheduler does not look far enough ahead to
        # overlap whole tiles (on v6e they take half as many cycles again one after the other).
        qs, ks, vs = ([tiles.load(blocks, x, chunk, t, step) for t in span] for x in (q, k, v))
        inside = [list(tiles.scores(blocks, weights, t, qs[t], ks[t], visible)) for t in span]
        before = [state[t] for t in span]
        # Weighting the product costs less accuracy than weighting q: that would be one more rounding to bfloat16.
        incoming = [weights.into(t, bounds) * tiles.dot(qs[t], before[t].astype(q.dtype)) for t in span]
        updates = [tiles.dot(tiles.scaled(ks[t], weights.onto(t, bounds)), vs[t], (0, 0)) for t in span]
        for t in span:
            out = tiles.mix(blocks, inside[t], vs[t]) + incoming[t]
            o[0, rows, pl.ds(t * blocks.tile, blocks.tile)] = weights.real(out, bounds).astype(o.dtype)
            keep = weights.keep(t, bounds, reverse=False)
            state[t] = keep * before[t] + tiles.block_diagonal(blocks, updates[t])

    @pl.when(step == blocks.time_blocks - 1)
    def _():
        tiles.store_state(blocks, state, final)
