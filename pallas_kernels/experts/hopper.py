"""The version for NVIDIA Hopper GPUs: grouped products in Pallas (`hopper_matmul`), everything between them by XLA.

Assignments are sorted by expert and every expert's rows are filled up to whole tiles with rows of any token, so that no
tile has two experts. Forward takes two kernels: silu(x w1^T) * (x w3^T), both products of a tile side by side, and
that times w2^T. Backward takes five of the same two kinds, and one for what stands between the products; it keeps the
two products inside from forward: where a layer is rematerialised, its gradient then computes nothing a third time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import sequential_vmap

from pallas_kernels import _hopper
from pallas_kernels._compat import varying_axes
from pallas_kernels.experts import hopper_few, hopper_matmul
from pallas_kernels.experts.exchange import Exchange, exchange
from pallas_kernels.experts.hopper_gate import gate_gradient
from pallas_kernels.experts.routing import Plan, plan
from pallas_kernels.kept import KEPT


def unsupported(x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array) -> str | None:
    """Why this implementation cannot run for these arguments, or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    dtypes = {a.dtype for a in (x, w1, w3, w2)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        found = ", ".join(sorted(d.name for d in dtypes))
        return (
            f"tokens and weights must be bfloat16 (the matrix units would quietly round float32 to TF32): got {found}"
        )
    inner, hidden = w1.shape[-2:]
    if hidden % 128 or inner % 128:
        return f"hidden and inner sizes must be multiples of 128: got {hidden} and {inner}"
    return None


def forward(
    x: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    w2: jax.Array,
    routes: jax.Array,
    weights: jax.Array,
    *,
    stacks: tuple[jax.Array, ...] | None = None,
    layer: jax.Array | int | None = None,
    axis_name: str | None = None,
    interpret=False,
) -> jax.Array:
    """Shapes as in `api.expert_mlp`; y [N,D] bfloat16."""
    how = _How(axis_name, interpret)
    if stacks is None:
        return _mlp(how, x, w1, w3, w2, routes, weights, None, None)
    return _mlp(how, x, w1, w3, w2, routes, weights, tuple(map(_flat, stacks)), layer)


def forward_of_layer(x, w1, w3, w2, routes, weights, layer, axis_name=None, interpret=False) -> jax.Array:
    """The same with stacks of weights, [L,E,F,D] and [L,E,D,F], which are read where they lie."""
    count = w1.shape[1]
    w1, w3, w2 = map(_flat, (w1, w3, w2))
    how = _How(axis_name, interpret)
    return _products(how, False, x, w1, w3, w2, routes, weights, count=count, layer=layer)[0]


class _How(NamedTuple):
    axis: str | None
    """over whose devices the experts are spread"""
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(how, x, w1, w3, w2, routes, weights, stacks, layer):
    """`stacks` are those of `api.expert_mlp`, the experts of all layers on one axis."""
    return _products(how, False, x, *(stacks or (w1, w3, w2)), routes, weights, count=len(w1), layer=layer)[0]


def _forward(how, x, w1, w3, w2, routes, weights, stacks, layer):
    matrices = stacks or (w1, w3, w2)
    y, *inside = _products(how, True, x, *matrices, routes, weights, count=len(w1), layer=layer)
    kept = (checkpoint_name(a, KEPT) for a in inside)
    return y, (x, *matrices, routes, weights, _number(layer), *kept, _Experts(len(w1)))


def _products(how, keep, *arrays, count, layer):
    """y, and if to be kept the products with w1 and w3, [P,F]; weights may be many layers' of `count` experts."""

    @sequential_vmap
    def run(x, w1, w3, w2, routes, weights, layer):
        if not keep and how.axis is None and x.shape[0] <= hopper_few.TOKENS:
            return (hopper_few.forward(x, w1, w3, w2, routes, weights, layer, count, interpret=how.interpret),)
        rows, by_rows = _sorted(routes, count, how.axis)
        by_rows["experts"] += layer * count
        multiply = functools.partial(hopper_matmul.rows_product, transpose_rhs=True, interpret=how.interpret, **by_rows)

        def gated(up, gate):
            hidden = up / (1 + jnp.exp(-up)) * gate
            return (hidden, up, gate) if keep else (hidden,)

        # What fills up an expert's rows may be any token: nobody asks for its output.
        x_rows = rows.some_rows(x)
        hidden, *kept = multiply([x_rows], [w1, w3], combine=gated, outputs=3 if keep else 1)
        (out,) = multiply([hidden], [w2])
        share = weights.astype(jnp.float32)[..., None]
        y = jnp.sum(share * rows.gather(out).astype(jnp.float32), axis=1).astype(x.dtype)
        return y, *kept

    return run(*arrays, _number(layer))


def _backward(how, saved, dy):
    *saved, experts = saved
    count = experts.count

    @sequential_vmap
    def run(x, w1, w3, w2, routes, weights, layer, up, gate, dy):
        rows, by_rows = _sorted(routes, count, how.axis)
        by_rows["experts"] += layer * count
        call = {"interpret": how.interpret}
        multiply = functools.partial(hopper_matmul.rows_product, transpose_rhs=False, **by_rows, **call)
        sums = functools.partial(hopper_matmul.weights_product, first=rows.start, count=rows.size, **call)
        share = rows.spread(weights.astype(jnp.float32))
        dy_rows = rows.rows(dy)
        (d_hidden,) = multiply([dy_rows], [w2])
        used = by_rows["used"] * hopper_matmul.TILE_ROWS
        d_up, d_gate, hidden, d_share = gate_gradient(d_hidden, up, gate, share, used, **call)
        (dx_rows,) = multiply([d_up, d_gate], [w1, w3])
        if varying_axes(x) and how.axis is None:  # It may come from other devices, and be on its way until here.
            x, dx_rows = jax.lax.optimization_barrier((x, dx_rows))
        x_rows = rows.rows(x)
        dx = jnp.sum(rows.gather(dx_rows).astype(jnp.float32), axis=1).astype(x.dtype)
        dw2 = sums(dy_rows, hidden)
        return dx, sums(d_up, x_rows), sums(d_gate, x_rows), dw2, rows.gather(d_share).astype(weights.dtype)

    dx, dw1, dw3, dw2, d_weights = run(*saved, dy)
    return dx, dw1, dw3, dw2, None, d_weights, None, None


_mlp.defvjp(_forward, _backward)


@jax.tree_util.register_static
class _Experts(NamedTuple):
    """How many a layer has, on its way to the backward pass."""

    count: int


def _number(layer) -> jax.Array:
    return jnp.asarray(0 if layer is None else layer, jnp.int32)


def _flat(stack: jax.Array) -> jax.Array:
    """[L,E,...] -> [L E,...]"""
    return stack.reshape(-1, *stack.shape[2:])


def _sorted(routes: jax.Array, experts: int, axis: str | None) -> tuple[Plan | Exchange, dict[str, jax.Array]]:
    """The plan, and what `hopper_matmul.rows_product` must know of it."""
    if axis is None:
        rows = plan(routes, experts, hopper_matmul.TILE_ROWS)
    else:
        rows = exchange(routes, experts, hopper_matmul.TILE_ROWS, axis)
    ends = (rows.start + rows.size) // hopper_matmul.TILE_ROWS
    tiles = jnp.arange(rows.length // hopper_matmul.TILE_ROWS)
    # Not `searchsorted`, which becomes a loop of small programs.
    expert = jnp.sum(ends <= tiles[:, None], axis=1, dtype=jnp.int32)
    return rows, {"experts": jnp.minimum(expert, experts - 1), "used": ends[-1:]}
