"""One token for each of a set of sequences on TPU; their states, rows of a pool, are updated where they lie."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def decode(q, k, v, log_decay, pool, slots, *, interpret: bool | pltpu.InterpretParams = False):
    """(o [N,H,V] in q's dtype, pool [P,H,K,V] float32); arguments as in `lightning_attention_decode`.

    The state of each sequence crosses HBM once in each direction, in float32 and without rounding in between.
    """
    sequences, heads, size = q.shape
    # The last two axes of a block of q, [heads, K], must be whole registers or the whole axis.
    block = next((n for n in (16, 8) if heads % n == 0), heads)
    row, own = _rows(slots)
    token = pl.BlockSpec((1, block, size), lambda h, n, row, own: (n, h, 0))
    state = pl.BlockSpec((1, block, size, size), lambda h, n, row, own: (row[n], h, 0, 0))
    struct = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    o, pool = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads // block, sequences),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), token, token, token, state],
            out_specs=(token, state),
        ),
        out_shape=(struct(q.shape, q.dtype), struct(pool.shape, pool.dtype)),
        input_output_aliases={6: 1},
        # Two buffers each for the states that come and go, and room for the rest.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=max(16 << 20, 4 * block * size * max(size, 128) * 4 + (8 << 20)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=5 * q.size * size,
            transcendentals=0,
            bytes_accessed=2 * 4 * q.size * size,
        ),
        interpret=interpret,
        name="lightning_attention_decode",
    )(row, own, jnp.expm1(log_decay), q, k, v, pool)  # lam itself, near 1, would lose digits step after step.
    return o, pool


def _rows(slots):
    """For each sequence the row of the pool that its step holds in VMEM, and 1 if that is its own (else 0).

    An idle sequence's step holds its neighbour's row, of the one before it where there is one. A block is written back
    only when the next step holds another, so this adds no traffic; and steps that hold the same row follow each other.
    """
    active = slots >= 0
    index = jnp.arange(slots.shape[0], dtype=jnp.int32)
    before = lax.cummax(jnp.where(active, index, -1))
    neighbour = jnp.where(before >= 0, before, jnp.argmax(active).astype(jnp.int32))
    return jnp.maximum(slots[neighbour], 0), active.astype(jnp.int32)


def _kernel(row, own, lam_minus_1, q, k, v, old, o, new):
    head_block, n = pl.program_id(0), pl.program_id(1)
    heads = q.shape[1]
    same_row = (n > 0) & (row[jnp.maximum(n - 1, 0)] == row[n])

    @pl.when(own[n] == 1)
    def _():
        # Columns of q and k, [K, heads], to be spread over the lanes of a state.
        columns = [x[0].astype(jnp.float32).T for x in (q, k)]
        values = v[0].astype(jnp.float32)
        for h in range(heads):
            state, update = old[0, h], columns[1][:, h : h + 1] * values[h : h + 1]
            state = state + (lam_minus_1[head_block * heads + h] * state + update)
            new[0, h] = state
            o[0, h : h + 1] = jnp.sum(columns[0][:, h : h + 1] * state, axis=0, keepdims=True).astype(o.dtype)

    @pl.when(own[n] == 0)
    def _():
        o[...] = jnp.zeros_like(o)

    # Idle sequences in front: the row is not theirs, but leaves VMEM all the same if no sequence follows that owns it.
    @pl.when((own[n] == 0) & ~same_row)
    def _():
        new[...] = old[...]
