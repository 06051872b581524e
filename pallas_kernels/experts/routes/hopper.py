"""On a Hopper GPU (Pallas, Mosaic GPU): one small kernel, a thread block a token, in float32 on its CUDA cores.

Each thread adds up the products of every 128th channel for all experts; then the sums of all threads, the choice and
the weights are scalars. A gate is some 100 KB, which all blocks but the first find in the L2 cache.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper

_THREADS = 128
_AHEAD = 4  # Pieces of 128 channels whose loads are under way together.
_EXPERTS = 64  # So many sums are in registers at most.


def unsupported(x: jax.Array, gates: jax.Array, k: int) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.expert_routes`), or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    if x.shape[1] % (_THREADS * _AHEAD):
        return f"it takes hidden sizes that are multiples of {_THREADS * _AHEAD}: got {x.shape[1]}"
    if gates.shape[1] > _EXPERTS:
        return f"it takes up to {_EXPERTS} experts: got {gates.shape[1]}"
    return None


def routes(x: jax.Array, gates: jax.Array, layer: jax.Array, k: int, *, interpret=False) -> tuple[jax.Array, jax.Array]:
    """Arguments as in `api.expert_routes`."""
    tokens, channels = x.shape
    experts = gates.shape[1]
    ops = _hopper.operations(interpret)

    def body(x_ref, gates_ref, layer_ref, routes_ref, weights_ref):
        token = lax.axis_index("token")
        gate_ref = gates_ref.at[layer_ref[0]]

        def add(piece, sums):
            for i in range(_AHEAD):
                at = pl.ds((piece * _AHEAD + i) * _THREADS, _THREADS)
                value = ops.load(x_ref.at[token, at], threads=True).astype(jnp.float32)
                sums = [total + value * ops.load(gate_ref.at[e, at], threads=True) for e, total in enumerate(sums)]
            return sums

        start = [ops.zeros((_THREADS,), threads=True)] * experts
        sums = lax.fori_loop(0, channels // (_THREADS * _AHEAD), add, start)
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

    inputs = (x, gates, layer.reshape(1))
    out = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((tokens, k), jnp.int32), jax.ShapeDtypeStruct((tokens, k), jnp.float32)],
        grid=(tokens,),
        grid_names=("token",),
        kernel_name="expert_routes",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    return _compat.vary_over(out[0], axes), _compat.vary_over(out[1], axes)
