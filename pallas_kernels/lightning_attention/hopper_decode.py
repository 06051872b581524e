"""One token for each of many sequences on a Hopper GPU (Pallas, Mosaic GPU): the states move through the chip once.

A thread block takes one head of one sequence: it reads the float32 state [K,V] from its row of the pool into registers, advances
it, and writes it back to the same place; the output is the sum over K of q times the new state, in float32 throughout.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lightning_attention import hopper_scan


def decode(q, k, v, log_decay, pool, slots, *, interpret=False):
    """(o [N,H,V] in q's dtype, pool [P,H,K,V] float32, updated in place); arguments as in `lightning_attention_decode`."""
    sequences, heads, key_size = q.shape
    value_size = v.shape[-1]
    ops = hopper_scan.operations(interpret)
    pool_ref = jax.new_ref(pool)

    def body(q_ref, k_ref, v_ref, decay_ref, slots_ref, pool_ref, o_ref):
        sequence, head = lax.axis_index("sequence"), lax.axis_index("head")
        slot = slots_ref[sequence]

        @pl.when(slot >= 0)
        def _():
            lam = jnp.exp(decay_ref[head])
            row = lambda ref: ops.load(ref.at[sequence, head], rows=True).astype(jnp.float32)
            across = lambda x: ops.down(x, (key_size, value_size))
            value = ops.load(v_ref.at[sequence, head], columns=True).astype(jnp.float32)
            state = lam * ops.load(pool_ref.at[slot, head])
            state = state + across(row(k_ref)) * ops.along(value, (key_size, value_size))
            pool_ref[slot, head] = state
            o_ref[sequence, head] = (across(row(q_ref)) * state).sum(axis=0).astype(o_ref.dtype)

        @pl.when(slot < 0)
        def _():
            o_ref[sequence, head] = ops.zeros((value_size,), o_ref.dtype, columns=True)

    o = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(v.shape, q.dtype),
        grid=(heads, sequences),
        grid_names=("head", "sequence"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=hopper_scan.interpreter(interpret),
    )(q, k, v, log_decay, slots, pool_ref)
    return o, jax.freeze(pool_ref)
