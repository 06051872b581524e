"""On a Hopper GPU (Pallas, Mosaic GPU): one small kernel, a thread block a token, in float32 on its CUDA cores.

Each thread adds up the products of every 128th channel for all experts, of a norm that it has written just before; then
the sums of all threads, the choice and the weights are scalars. A gate is some 100 KB, which all blocks but the first
find in the L2 cache.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.norms import hopper
from pallas_kernels.norms.api import Norm, Term
from pallas_kernels.norms.hopper import THREADS

_AHEAD = 4  # Pieces of 128 channels whose loads are under way together.
_EXPERTS = 64  # So many sums are in registers at most.


def unsupported(terms: Sequence[Term], gates: jax.Array) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.expert_routes`), or None."""
    reason = hopper.unsupported(terms)
    if reason is not None:
        return reason
    if gates.shape[2] % (THREADS * _AHEAD):
        return f"it takes hidden sizes that are multiples of {THREADS * _AHEAD}: got {gates.shape[2]}"
    if gates.shape[1] > _EXPERTS:
        return f"it takes up to {_EXPERTS} experts: got {gates.shape[1]}"
    return None


def routes(
    terms: Sequence[Term], norm: Norm, gates: jax.Array, layer: jax.Array, k: int, *, interpret=False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Arguments as in `api.expert_routes`."""
    tokens, channels = terms[0][0].shape
    experts = gates.shape[1]
    ops = _hopper.operations(interpret)

    def body(layer_ref, norm_ref, gates_ref, *refs):
        *term_refs, y_ref, routes_ref, weights_ref = refs
        token = lax.axis_index("token")
        gate_ref = gates_ref.at[layer_ref[0]]
        rows = [(ref.at[token], factor) for ref, (_, factor) in zip(term_refs, terms, strict=True)]
        hopper.norm_row(
            ops, rows, norm_ref.at[layer_ref[0]], norm.eps, channels,
            lambda at, value: ops.store(y_ref.at[token, at], value),
        )  # fmt: skip

        def add(piece, sums):
            for i in range(_AHEAD):
                at = pl.ds((piece * _AHEAD + i) * THREADS, THREADS)
                value = ops.load(y_ref.at[token, at], threads=True).astype(jnp.float32)
                sums = [total + value * ops.load(gate_ref.at[e, at], threads=True) for e, total in enumerate(sums)]
            return sums

        start = [ops.zeros((THREADS,), threads=True)] * experts
        sums = lax.fori_loop(0, channels // (THREADS * _AHEAD), add, start)
        scores = [jnp.sum(total) for total in sums]
        chosen = []
        for _ in range(k):
            best, where = scores[0], jnp.int32(0)
            for e, score in enumerate(scores[1:], 1):
                where = jnp.where(score > best, e, where)
                best = jnp.maximum(score, best)
            chosen.append((best, where))
            scores = [jnp.where(where == e, -jnp.inf, score) for e, score in enumerate(scores)]
        shares = [jnp.exp2((score - chosen[0][0]) * math.log2(math.e)) for score, _ in chosen]
        total = sum(shares)
        for place, ((_, where), share) in enumerate(zip(chosen, shares)):
            routes_ref[token, place] = where
            weights_ref[token, place] = share / total

    inputs = (layer.reshape(1), norm.weights, gates, *(a for a, _ in terms))
    y, routes, weights = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((tokens, channels), terms[0][0].dtype),
            jax.ShapeDtypeStruct((tokens, k), jnp.int32),
            jax.ShapeDtypeStruct((tokens, k), jnp.float32),
        ],
        grid=(tokens,),
        grid_names=("token",),
        kernel_name="expert_routes",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    return _compat.vary_over(y, axes), _compat.vary_over(routes, axes), _compat.vary_over(weights, axes)
