"""On a Hopper GPU (Pallas, Mosaic GPU): the backward pass of what stands between an expert's products.

Row by row, and only the rows that are in use: there is room for all tokens of all devices that share the experts.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper

_THREADS = 128
_WIDTH = 1024
"""channels at a time: eight of each array for a thread, as many as it loads at once"""

_BLOCKS = 6
"""on a multiprocessor"""


@functools.partial(jax.jit, static_argnames="interpret")
def gate_gradient(d_hidden, up, gate, share, used, *, interpret=False):
    """Of y_r = share_r (silu(up_r) gate_r) W, given d_hidden = dy W^T.

    Args:
      d_hidden, up, gate: [P,F] bfloat16, F a multiple of 128.
      share: [P] float32.
      used: [1] int32, rows that are in use, the first ones. Nothing is written for those behind them.

    Returns:
      d_up, d_gate and share silu(up) gate, [P,F] bfloat16, and d_share [P] float32.
    """
    rows, channels = up.shape
    width = max(w for w in range(_THREADS, _WIDTH + 1, _THREADS) if channels % w == 0)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(8, width // _THREADS))
    blocks = 2 if interpret else _BLOCKS * _hopper.MULTIPROCESSORS

    def body(d_hidden_ref, up_ref, gate_ref, share_ref, used_ref, d_up_ref, d_gate_ref, hidden_ref, d_share_ref):
        block = lax.axis_index("block")

        @pl.loop(0, lax.div(used_ref[0] + blocks - 1 - block, jnp.int32(blocks)))
        def _(index):
            row = block + index * blocks
            share = share_ref[row]

            def some(piece, total):
                at = pl.ds(piece * width, width)

                def load(ref):
                    value = ref[row, at] if interpret else _compat.load(ref.at[row, at], layout)
                    return value.astype(jnp.float32)

                def store(ref, value):
                    ref[row, at] = value.astype(ref.dtype)

                d_hidden, up, gate = map(load, (d_hidden_ref, up_ref, gate_ref))
                sigmoid = 1 / (1 + jnp.exp2(up * -math.log2(math.e)))
                act = up * sigmoid
                hidden = act * gate
                given = d_hidden * share
                store(d_up_ref, given * gate * (sigmoid + act * (1 - sigmoid)))
                store(d_gate_ref, given * act)
                store(hidden_ref, hidden * share)
                return total + jnp.sum(d_hidden * hidden)

            d_share_ref[row] = lax.fori_loop(0, channels // width, some, jnp.float32(0))

    like = jax.ShapeDtypeStruct(up.shape, up.dtype)
    inputs = (d_hidden, up, gate, share, used)
    out = plgpu.kernel(
        body,
        out_type=[like, like, like, jax.ShapeDtypeStruct((rows,), jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="expert_gate_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    return [_compat.vary_over(a, axes) for a in out]
