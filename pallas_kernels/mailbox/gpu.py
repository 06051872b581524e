"""The mailbox on a Hopper GPU (Pallas, Mosaic GPU), which reads and writes the host's memory by its address.

Loads and stores are the system's, not the chip's: what a cache has kept of the memory is not believed.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels._hopper import missing as unsupported
from pallas_kernels.mailbox.layout import SECONDS

__all__ = ["ask", "tell", "unsupported"]

_STORE = """{
.reg .pred first;
.reg .b32 thread;
.reg .b64 address, offset, pair;
mov.b64 address, {$1, $2};
cvt.u64.u32 offset, $3;
add.s64 address, address, offset;
mov.b64 pair, {$4, $5};
mov.u32 thread, %tid.x;
setp.eq.u32 first, thread, 0;
@first st.relaxed.sys.global.b64 [address], pair;
mov.b32 $0, $4;
}"""

# One thread looks, and the barrier lets the others know what it has seen: none of them loads an answer before.
_WAIT = """{
.reg .pred other, there, early;
.reg .b32 thread, found, ahead;
.reg .b64 address, began, now;
mov.b64 address, {$1, $2};
mov.b32 ahead, -1;
mov.u32 thread, %tid.x;
setp.ne.u32 other, thread, 0;
@other bra over;
mov.u64 began, %globaltimer;
again:
ld.acquire.sys.global.b32 found, [address];
sub.s32 ahead, found, $3;
setp.ge.s32 there, ahead, 0;
@there bra over;
mov.u64 now, %globaltimer;
sub.u64 now, now, began;
setp.lt.u64 early, now, NANOSECONDS;
@early bra again;
over:
setp.ge.s32 there, ahead, 0;
barrier.cta.red.or.pred there, 0, there;
selp.b32 $0, 1, 0, there;
}""".replace("NANOSECONDS", str(SECONDS * 10**9))

_LOAD = """{
.reg .b64 address, offset;
mov.b64 address, {$1, $2};
cvt.u64.u32 offset, $3;
add.s64 address, address, offset;
ld.relaxed.sys.global.b32 $0, [address];
}"""


def tell(address, number, words, layout):
    def kernel(address_ref, number_ref, words_ref, out_ref):
        row = lax.axis_index("row")
        memory, offset = (address_ref[0], address_ref[1]), 4 * layout.told + 8 * row
        out_ref[row] = _assembly(_STORE, *memory, offset, words_ref[row], number_ref[0])

    return _by_rows(kernel, words.shape, "tell")(address.view(jnp.int32), number[None], words)


def ask(address, number, asks, after, layout):
    rows, words = layout.rows, layout.words
    lanes = -(-words // _THREADS) * _THREADS

    def kernel(address_ref, number_ref, asks_ref, after_ref, out_ref):
        row = lax.axis_index("row")

        def answer():
            memory = address_ref[0], address_ref[1]
            there = _assembly(_WAIT, *memory, number_ref[0])
            word = plgpu.broadcasted_iota(jnp.int32, (lanes,), 0, layout=_layout((lanes,)))
            offset = 4 * (layout.answers + row * words + jnp.minimum(word, words - 1))
            return jnp.where(there != 0, _assembly(_LOAD, *memory, offset), 0)

        def everything():
            return plgpu.layout_cast(jnp.full(lanes, -1, jnp.int32), _layout((lanes,)))

        out_ref[row] = lax.cond(asks_ref[row] != 0, answer, everything)

    run = _by_rows(kernel, (rows, lanes), "ask")
    return run(address.view(jnp.int32), number[None], asks.astype(jnp.int32), after)[:, :words].view(jnp.uint32)


def _by_rows(kernel, shape, name):
    """What runs a kernel in one thread block for each row of the result, int32."""
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, jnp.int32),
        grid=shape[:1],
        grid_names=("row",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


_THREADS = 128


def _layout(shape):
    """Of one value for all threads, or of lanes, which the threads take in turn."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=1) if shape else plgpu.Layout.WG_SPLAT()


def _assembly(text, *arguments):
    """What instructions leave in $0 of the values of the arguments in $1 and so on, all int32.

    Arguments are scalars or [lanes]. Without lanes, the instructions must leave the same in all threads.
    """
    layouts = [_layout(x.shape) for x in arguments]
    shape = jnp.broadcast_shapes(*(x.shape for x in arguments))
    constraints = ",".join(["=r", *["r"] * len(arguments), "~{memory}"])

    @plgpu.inline_mgpu(arg_types=layouts, return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=_layout(shape)))
    def run(_, *arrays):
        layout, i32 = _layout(shape).to_mgpu(), ir.IntegerType.get_signless(32)
        register = layout.registers_element_type(i32)

        def lane(*registers):
            values = [mgpu.utils.bitcast(x, i32) for x in registers]
            result = llvm.inline_asm(i32, values, text, constraints, has_side_effects=True)
            return mgpu.utils.bitcast(result, register)

        results = np.frompyfunc(lane, len(arrays), 1)(*(x.registers for x in arrays))
        return mgpu.FragmentedArray(_registers=np.asarray(results), _layout=layout, _is_signed=True)

    return run(*arguments)
