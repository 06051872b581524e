"""What the kernels for NVIDIA Hopper GPUs share (Pallas' Mosaic GPU dialect)."""

import types
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, target

MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM): how many thread blocks that fill their shared memory run at once."""

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""How the matrix units want two-byte operands in shared memory."""

_KINDS = ("H100", "H200", "H800", "H20", "GH200")


def missing() -> str | None:
    """Why programs traced now will not run on a Hopper GPU, or None."""
    platform = target.target_platform()
    if platform != "gpu":
        return f"it needs an NVIDIA Hopper GPU, and this program is for {platform}"
    kind = target.device_kind()
    if not any(name in kind for name in _KINDS):
        return f"it needs an NVIDIA Hopper GPU, and this one is {kind!r}"
    return None


class _Chip:
    """The operations that Pallas' interpreter does not know in the form that the chip wants."""

    def iota(self, shape, axis, rows=False):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=self._layout(rows))

    def zeros(self, shape, dtype=jnp.float32, rows=False, columns=False, threads=False):
        return plgpu.layout_cast(jnp.zeros(shape, dtype), self._layout(rows, columns, threads))

    def load(self, ref, rows=False, columns=False, threads=False):
        return _compat.load(ref, self._layout(rows, columns, threads))

    def store(self, ref, value):
        """To memory, whose sectors a value's layout need not fill."""
        if hasattr(plgpu, "store"):
            plgpu.store(ref, value, optimized=False)
        else:
            ref[...] = value

    def down(self, values, shape):
        """[rows] -> [rows, columns]."""
        return lax.broadcast_in_dim(values, shape, [0])

    def along(self, values, shape):
        """[columns] -> [rows, columns]."""
        return lax.broadcast_in_dim(values, shape, [1])

    def fresh(self, function, *shapes):
        """function(*accumulators), which start at zero."""
        return pl.run_scoped(function, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def onto(self, value, a, b, transpose_a=False, transpose_b=False, meanwhile=lambda: None):
        """value + a b; runs meanwhile() while the product is computed."""

        def multiply(acc):
            self.wgmma(acc, a, b, transpose_a=transpose_a, transpose_b=transpose_b)
            meanwhile()

        return cast(jax.Array, pl.run_state(multiply)(plgpu.ACC.init(value)))

    def wgmma(self, acc, a, b, transpose_a=False, transpose_b=False):
        """Starts acc += a b."""
        plgpu.wgmma(acc, _compat.transposed(a) if transpose_a else a, _compat.transposed(b) if transpose_b else b)

    def wait(self, in_flight):
        """Until no more than `in_flight` products are still running."""
        plgpu.wgmma_wait(in_flight)

    def result(self, acc, in_flight=0):
        """The accumulator once no more than `in_flight` products are still running."""
        return plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)

    def _layout(self, rows=False, columns=False, threads=False):
        """Of a matrix, of a vector of one value per row or column of it, or of one of one value per thread."""
        if threads:
            return plgpu.Layout.WG_STRIDED((128,), vec_size=1)
        layout = plgpu.Layout.WGMMA
        return layout.reduce(1) if rows else layout.reduce(0) if columns else layout


class _Emulated(_Chip):
    """The same for the interpreter: products are computed at once from what shared memory holds."""

    def iota(self, shape, axis, rows=False):
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def zeros(self, shape, dtype=jnp.float32, rows=False, columns=False, threads=False):
        return jnp.zeros(shape, dtype)

    def load(self, ref, rows=False, columns=False, threads=False):
        return ref[...]

    def store(self, ref, value):
        ref[...] = value

    def fresh(self, function, *shapes):
        return function(*(types.SimpleNamespace(value=0.0) for _ in shapes))

    def onto(self, value, a, b, transpose_a=False, transpose_b=False, meanwhile=lambda: None):
        acc = types.SimpleNamespace(value=value)
        self.wgmma(acc, a, b, transpose_a=transpose_a, transpose_b=transpose_b)
        meanwhile()
        return acc.value

    def wgmma(self, acc, a, b, transpose_a=False, transpose_b=False):
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        plgpu.commit_smem()  # The chip reads through the copy engine's proxy; these loads did not.
        a, b = (x.T if transpose else x for x, transpose in ((a, transpose_a), (b, transpose_b)))
        acc.value += jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)

    def wait(self, in_flight):
        pass

    def result(self, acc, in_flight=0):
        return acc.value


def operations(interpret) -> _Chip:
    """Those for the chip, or for Pallas' interpreter."""
    return _Emulated() if interpret else _Chip()
