"""What a Hopper GPU's matrix units and registers do, in two forms: for the chip, and for Pallas' interpreter.

The interpreter emulates copies, barriers and the order of accesses, but not the matrix units.
"""

import types
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat


class _Chip:
    """The operations that Pallas' interpreter does not know in the form that the chip wants."""

    def iota(self, shape, axis, rows=False):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=self._layout(rows))

    def zeros(self, shape, dtype=jnp.float32, rows=False, columns=False):
        return plgpu.layout_cast(jnp.zeros(shape, dtype), self._layout(rows, columns))

    def load(self, ref, rows=False, columns=False):
        return _compat.load(ref, self._layout(rows, columns))

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

    def onto_each(self, function, *values):
        """function(*accumulators), which start at the values; what they are in the end."""
        return pl.run_state(lambda accs: function(*accs))(tuple(plgpu.ACC.init(value) for value in values))

    def wgmma(self, acc, a, b, transpose_a=False, transpose_b=False):
        """Starts acc += a b."""
        plgpu.wgmma(acc, _compat.transposed(a) if transpose_a else a, _compat.transposed(b) if transpose_b else b)

    def wait(self, in_flight):
        """Until no more than `in_flight` products are still running."""
        plgpu.wgmma_wait(in_flight)

    def result(self, acc, in_flight=0):
        """The accumulator once no more than `in_flight` products are still running."""
        return plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)

    def _layout(self, rows=False, columns=False):
        """Of a matrix, or of a vector of one value per row or column of it."""
        layout = plgpu.Layout.WGMMA
        return layout.reduce(1) if rows else layout.reduce(0) if columns else layout


class _Emulated(_Chip):
    """The same for the interpreter: products are computed at once from what shared memory holds."""

    def iota(self, shape, axis, rows=False):
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def zeros(self, shape, dtype=jnp.float32, rows=False, columns=False):
        return jnp.zeros(shape, dtype)

    def load(self, ref, rows=False, columns=False):
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

    def onto_each(self, function, *values):
        accs = [types.SimpleNamespace(value=value) for value in values]
        function(*accs)
        return tuple(acc.value for acc in accs)

    def wgmma(self, acc, a, b, transpose_a=False, transpose_b=False):
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        plgpu.commit_smem()  # The chip reads through the copy engine's proxy; these loads did not.
        a, b = (x.T if transpose else x for x, transpose in ((a, transpose_a), (b, transpose_b)))
        acc.value += jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)

    def wait(self, in_flight):
        pass

    def result(self, acc, in_flight=0):
        return acc.value


def operations(interpret):
    return _Emulated() if interpret else _Chip()
