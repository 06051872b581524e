"""The mailbox on an NVIDIA GPU (Pallas, Triton dialect), which reads and writes the host's memory by its address.

Loads and stores are the system's, not the chip's: what a cache has kept of the memory is not believed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import target
from pallas_kernels.mailbox.layout import SECONDS

_STORE = """{
.reg .b64 address, offset, pair;
mov.b64 address, {$1, $2};
cvt.u64.u32 offset, $3;
add.s64 address, address, offset;
mov.b64 pair, {$4, $5};
st.relaxed.sys.global.b64 [address], pair;
mov.b32 $0, $4;
}"""

_WAIT = """{
.reg .pred go;
.reg .b32 found, ahead;
.reg .b64 address, began, now;
mov.b64 address, {$1, $2};
mov.u64 began, %globaltimer;
again:
ld.acquire.sys.global.b32 found, [address];
sub.s32 ahead, found, $3;
setp.ge.s32 go, ahead, 0;
@go bra.uni over;
mov.u64 now, %globaltimer;
sub.u64 now, now, began;
setp.lt.u64 go, now, NANOSECONDS;
@go bra.uni again;
over:
mov.b32 $0, ahead;
}""".replace("NANOSECONDS", str(SECONDS * 10**9))

_LOAD = """{
.reg .b64 address, offset;
mov.b64 address, {$1, $2};
cvt.u64.u32 offset, $3;
add.s64 address, address, offset;
ld.relaxed.sys.global.b32 $0, [address];
}"""


def unsupported(*_: object) -> str | None:
    platform = target.target_platform()
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and this program is for {platform}"
    kind = target.device_kind()
    return None if "NVIDIA" in kind else f"it needs an NVIDIA GPU, and this one is {kind!r}"


def tell(address, number, words, layout):
    rows = pl.next_power_of_2(max(_WARP, len(words)))

    def kernel(address_ref, number_ref, words_ref, out_ref):
        word, row = words_ref[...], jnp.arange(rows, dtype=jnp.int32)
        # Lanes beyond the rows say the same as the last.
        offset = 4 * layout.told + 8 * jnp.minimum(row, len(words) - 1)
        arguments = [*_halves(address_ref, rows), offset, word, jnp.full(rows, number_ref[0])]
        out_ref[...] = _assembly(_STORE, "=r,r,r,r,r,r", arguments)

    padded = jnp.pad(words, (0, rows - len(words)), mode="edge")
    shape = jax.ShapeDtypeStruct((rows,), jnp.int32)
    told = pl.pallas_call(kernel, shape, **_TRITON, name="tell")
    return told(address.view(jnp.int32), number[None], padded)[: len(words)]


def ask(address, number, asks, after, layout):
    rows, words = layout.rows, layout.words
    width = pl.next_power_of_2(words)

    def kernel(address_ref, number_ref, asks_ref, after_ref, out_ref):
        row = pl.program_id(0)

        @pl.when(asks_ref[row] != 0)
        def _():
            wait = [*_halves(address_ref, _WARP), jnp.full(_WARP, number_ref[0])]
            ahead = jnp.max(_assembly(_WAIT, "=r,r,r,r", wait))
            word = jnp.minimum(jnp.arange(width, dtype=jnp.int32), words - 1)
            offset = 4 * (layout.answers + row * words + word)
            # What was waited for is an argument, too: nothing is loaded before.
            load = [*_halves(address_ref, width), offset, jnp.full(width, ahead)]
            answer = _assembly(_LOAD, "=r,r,r,r,r", load)
            out_ref[0, :] = jnp.where(ahead >= 0, answer, 0)

        @pl.when(asks_ref[row] == 0)
        def _():
            out_ref[0, :] = jnp.full(width, -1, jnp.int32)

    whole = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((rows, width), jnp.int32),
        grid=(rows,),
        in_specs=[whole] * 4,
        out_specs=pl.BlockSpec((1, width), lambda row: (row, 0)),
        **_TRITON,
        name="ask",
    )(address.view(jnp.int32), number[None], asks.astype(jnp.int32), after)
    return out[:, :words].view(jnp.uint32)


_WARP = 32
_TRITON = {"compiler_params": plgpu.CompilerParams(num_warps=4)}


def _halves(address_ref, size):
    return [jnp.full(size, address_ref[half]) for half in range(2)]


def _assembly(text, constraints, arguments):
    out = jax.ShapeDtypeStruct(arguments[0].shape, jnp.int32)
    (result,) = plgpu.elementwise_inline_asm(
        text, args=arguments, constraints=constraints, pack=1, result_shape_dtypes=[out]
    )
    return result
