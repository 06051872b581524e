"""On a Hopper GPU (Pallas, Mosaic GPU): one small kernel, a thread block a token, each thread every 128th channel."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.norms.api import Norm, Term

THREADS = 128


def unsupported(terms: Sequence[Term]) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.normed`), or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    x = terms[0][0]
    if x.dtype != jnp.bfloat16:
        return f"it takes bfloat16: got {x.dtype}"
    if x.shape[1] % THREADS or x.shape[1] > 64 * THREADS:
        return f"it takes multiples of {THREADS} channels, up to {64 * THREADS}: got {x.shape[1]}"
    return None


def normed(
    terms: Sequence[Term], norm: Norm, layer: jax.Array, gate: jax.Array | None, *, interpret=False
) -> jax.Array:
    """Arguments as in `api.normed`."""
    x = terms[0][0]
    ops = _hopper.operations(interpret)
    gates = [] if gate is None else [gate]

    def body(layer_ref, weights_ref, *refs):
        *term_refs, out_ref = refs
        token = lax.axis_index("token")
        gate_refs, term_refs = term_refs[len(terms) :], term_refs[: len(terms)]

        def store(at, value):
            for ref in gate_refs:
                value = (value * ops.load(ref.at[token, at], threads=True).astype(jnp.float32)).astype(jnp.bfloat16)
            ops.store(out_ref.at[token, at], value)

        rows = [(ref.at[token], factor) for ref, (_, factor) in zip(term_refs, terms)]
        norm_row(ops, rows, weights_ref.at[layer_ref[0]], norm.eps, x.shape[1], store)

    inputs = (layer.reshape(1), norm.weights, *(a for a, _ in terms), *gates)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(len(x),),
        grid_names=("token",),
        kernel_name="normed",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    return _compat.vary_over(out, _compat.varying_axes(*inputs))


def norm_row(ops, rows, weight_ref, eps, channels, store) -> None:
    """store(channels, value) every piece of one token's norm, bfloat16; `rows` are its terms in global memory."""

    def rounded(value):
        return value.astype(jnp.bfloat16).astype(jnp.float32)

    places = [pl.ds(start, THREADS) for start in range(0, channels, THREADS)]
    pieces = []
    for at in places:
        loaded = [ops.load(ref.at[at], threads=True).astype(jnp.float32) * factor for ref, factor in rows]
        pieces.append(rounded(sum(loaded[1:], start=loaded[0])))
    weights = [ops.load(weight_ref.at[at], threads=True).astype(jnp.float32) for at in places]
    squares = [piece * piece for piece in pieces]
    inverse = lax.rsqrt(jnp.sum(sum(squares[1:], start=squares[0])) / channels + eps)
    for at, piece, weight in zip(places, pieces, weights, strict=True):
        store(at, (rounded(piece * inverse) * weight).astype(jnp.bfloat16))
