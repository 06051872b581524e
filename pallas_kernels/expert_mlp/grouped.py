"""The CPU's version: a loop over the experts that have tokens, and over blocks of their tokens; no other work.

Assignments are sorted by expert. An expert's weights are sliced out once, then its rows go through in blocks; the last
block runs past the expert's end, and what it writes there is overwritten by the next expert's first block. The rest of
an expert's rows takes the smallest block that holds it, so that 130 rows do not cost 256.

Decoding is another regime: with one to four rows, the weights' way through memory is all that counts. XLA:CPU copies a
dynamic slice before a dot, but fuses it into elementwise work, so there the product is written as a chain of
multiply-adds over vectors that read the stacked weights in place (measured on two cores, 8 experts of 512 x 768: one
row 17 GB/s against 11 with a slice and a dot).

Everything is float32 inside, whatever the arguments are: XLA:CPU multiplies bfloat16 some thirty times slower.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._compat import vary_over, varying_axes

BLOCKS = (
    8,
    16,
    32,
    64,
    96,
    128,
    192,
    256,
)  # rows of a product; more bring nothing, fewer waste time packing the weights
FEW = (1, 2, 4)  # rows that take the chain of multiply-adds instead
LANES = 16  # floats that the chain keeps side by side
LINKS = 64  # at most so many links in the chain: every one is an instruction that XLA has to compile


class _Plan(NamedTuple):
    """Assignments sorted by expert: those of expert e stand at rows start[e] : start[e] + size[e]."""

    token: jax.Array  # [A] of each sorted row
    row: jax.Array  # [N, k] where each assignment stands
    valid: jax.Array  # [N, k] whether it belongs to an expert here
    start: jax.Array  # [E]
    size: jax.Array  # [E]
    active: jax.Array  # [E] the experts, those with rows first
    count: jax.Array  # how many have rows


def _plan(routes: jax.Array, num_experts: int) -> _Plan:
    flat = routes.reshape(-1)
    valid = (flat >= 0) & (flat < num_experts)
    expert = jnp.where(valid, flat, num_experts)
    order = jnp.argsort(expert, stable=True)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    size = jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return _Plan(
        token=order // routes.shape[1],
        row=row.reshape(routes.shape),
        valid=valid.reshape(routes.shape),
        start=jnp.cumsum(size) - size,
        size=size,
        active=jnp.argsort(size == 0, stable=True),
        count=jnp.sum(size > 0),
    )


@jax.custom_vjp
def forward(
    x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array, routes: jax.Array, weights: jax.Array
) -> jax.Array:
    """Shapes as in `api.expert_mlp`; y [N, D] in x's dtype."""
    plan = _plan(routes, w1.shape[0])
    assignments = routes.size
    few = _few(assignments, w1, w2)
    blocks = _blocks(assignments)
    rows = _sorted_rows(x, plan, blocks[-1])

    def whole(e, turn, out):
        e = e + turn
        a, b, c = (_expert(w, e) for w in (w1, w3, w2))

        def block(at, size, out):
            r = jax.lax.dynamic_slice_in_dim(rows, at, size)
            hidden = jax.nn.silu(_dot(r, a, 1, 1)) * _dot(r, b, 1, 1)
            return jax.lax.dynamic_update_slice_in_dim(out, _dot(hidden, c, 1, 1), at, 0)

        return _in_blocks(plan.start[e], plan.size[e], blocks, block, out)

    def expert(i, out):
        e = plan.active[i]
        size = plan.size[e]
        below = 0
        for n in few:
            chain = functools.partial(_few_rows, rows, w1, w3, w2, e, plan.start[e], n)
            out = _when((size > below) & (size <= n), chain, out)
            below = n
        return _when(size > below, functools.partial(whole, e), out)

    out = vary_over(jnp.zeros(rows.shape, jnp.float32), varying_axes(x, w1, w3, w2, routes))
    out = jax.lax.fori_loop(0, plan.count, expert, out)
    share = jnp.where(plan.valid, weights.astype(jnp.float32), 0.0)
    return jnp.einsum("nk,nkd->nd", share, out[plan.row]).astype(x.dtype)


def _forward(x, w1, w3, w2, routes, weights):
    return forward(x, w1, w3, w2, routes, weights), (x, w1, w3, w2, routes, weights)


def _backward(saved, dy):
    """The products of the forward pass are computed again: kept, they would be the largest thing in memory."""
    x, w1, w3, w2, routes, weights = saved
    plan = _plan(routes, w1.shape[0])
    blocks = _blocks(routes.size)
    rows = _sorted_rows(x, plan, blocks[-1])
    dy_rows = _sorted_rows(dy, plan, blocks[-1])
    share = jnp.zeros(rows.shape[0], jnp.float32).at[plan.row].set(weights.astype(jnp.float32))
    index = jnp.arange(rows.shape[0])

    def expert(i, carry):
        dx, dshare, dw1, dw3, dw2 = carry
        e = plan.active[i]
        end = plan.start[e] + plan.size[e]
        a, b, c = (_expert(w, e) for w in (w1, w3, w2))

        def block(at, size, carry):
            dx, dshare, da, db, dc = carry
            r, dy_r, share_r, index_r = (
                jax.lax.dynamic_slice_in_dim(z, at, size) for z in (rows, dy_rows, share, index)
            )
            # Rows past the expert's end are another's: they may not enter the sums over rows.
            share_r = jnp.where(index_r < end, share_r, 0.0)[:, None]
            up, gate = _dot(r, a, 1, 1), _dot(r, b, 1, 1)
            sigmoid = jax.nn.sigmoid(up)
            act = up * sigmoid
            d_hidden = _dot(dy_r, c, 1, 0)
            d_share = jnp.sum(d_hidden * act * gate, axis=1)
            d_hidden = d_hidden * share_r
            d_up = d_hidden * gate * (sigmoid + act * (1.0 - sigmoid))
            d_gate = d_hidden * act
            dx = jax.lax.dynamic_update_slice_in_dim(dx, _dot(d_up, a, 1, 0) + _dot(d_gate, b, 1, 0), at, 0)
            dshare = jax.lax.dynamic_update_slice_in_dim(dshare, d_share, at, 0)
            dc = dc + _dot(dy_r, act * gate * share_r, 0, 0)
            return dx, dshare, da + _dot(d_up, r, 0, 0), db + _dot(d_gate, r, 0, 0), dc

        zeros = (vary_over(jnp.zeros(z.shape, jnp.float32), axes) for z in (a, b, c))
        dx, dshare, da, db, dc = _in_blocks(plan.start[e], plan.size[e], blocks, block, (dx, dshare, *zeros))
        dw1, dw3, dw2 = (
            jax.lax.dynamic_update_index_in_dim(dw, d.astype(dw.dtype), e, 0)
            for dw, d in ((dw1, da), (dw3, db), (dw2, dc))
        )
        return dx, dshare, dw1, dw3, dw2

    axes = varying_axes(x, w1, w3, w2, routes, weights, dy)
    shapes = ((rows.shape, jnp.float32), (index.shape, jnp.float32), *((w.shape, w.dtype) for w in (w1, w3, w2)))
    start = tuple(vary_over(jnp.zeros(shape, dtype), axes) for shape, dtype in shapes)
    dx, dshare, dw1, dw3, dw2 = jax.lax.fori_loop(0, plan.count, expert, start)
    dx = jnp.sum(jnp.where(plan.valid[..., None], dx[plan.row], 0.0), axis=1)
    dweights = jnp.where(plan.valid, dshare[plan.row], 0.0)
    return dx.astype(x.dtype), dw1, dw3, dw2, None, dweights.astype(weights.dtype)


forward.defvjp(_forward, _backward)


def _sorted_rows(x: jax.Array, plan: _Plan, spare: int) -> jax.Array:
    """[A + spare, D] float32: a row per assignment, sorted by expert, and room for the last block to run into."""
    return jnp.pad(x.astype(jnp.float32)[plan.token], ((0, spare), (0, 0)))


def _expert(w: jax.Array, e: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w, e, 0, keepdims=False).astype(jnp.float32)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())))


def _when(condition: jax.Array, f: Callable, carry):
    """f(0, carry) if the condition holds. A loop of at most one turn, because it never copies what it carries.

    XLA moves whatever does not depend on the turn in front of the loop, and so computes it whether the condition holds
    or not: f must read its arrays at places that depend on the 0 it is given.
    """
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), f, carry)


def _blocks(assignments: int) -> tuple[int, ...]:
    """The sizes that can occur: all up to the first that holds every assignment."""
    return tuple(b for smaller, b in zip((0, *BLOCKS), BLOCKS) if smaller < assignments)


def _in_blocks(start: jax.Array, size: jax.Array, blocks: tuple[int, ...], block: Callable, carry):
    """block(first row, rows, carry) over an expert's rows: the largest size, then the smallest that holds the rest."""
    largest = blocks[-1]
    full = size // largest
    carry = jax.lax.fori_loop(0, full, lambda i, carry: block(start + i * largest, largest, carry), carry)
    rest = size - full * largest
    smaller = 0
    for b in blocks:

        def run(turn, carry, size=b):
            return block(start + full * largest + turn, size, carry)

        carry = _when((rest > smaller) & (rest <= b), run, carry)
        smaller = b
    return carry


def _few(assignments: int, w1: jax.Array, w2: jax.Array) -> tuple[int, ...]:
    """The row counts for which the chain of multiply-adds is compiled: when decoding, if the sizes allow vectors."""
    if assignments > 128 or w1.shape[2] % LANES or w2.shape[2] % LANES or w1.dtype != jnp.float32:
        return ()
    return tuple(n for smaller, n in zip((0, *FEW), FEW) if smaller < assignments)


def _few_rows(rows, w1, w3, w2, e, start, n, turn, out):
    e, start = e + turn, start + turn
    r = jax.lax.dynamic_slice_in_dim(rows, start, n)
    hidden = jax.nn.silu(_chain(w1, e, r)) * _chain(w3, e, r)
    return jax.lax.dynamic_update_slice_in_dim(out, _chain(w2, e, hidden.T).T, start, 0)


def _chain(w: jax.Array, e: jax.Array, x: jax.Array) -> jax.Array:
    """w[e] @ x.T [O, n] for w [E, O, I] and x [n, I], reading w in place."""
    E, O, I = w.shape
    n = x.shape[0]
    lanes = next(m for m in range(LANES, I + 1, LANES) if I % m == 0 and I // m <= LINKS)
    cut, x = w.reshape(E, O, I // lanes, lanes), x.reshape(n, I // lanes, lanes)
    total = jnp.zeros(())
    for c in range(I // lanes):
        piece = jax.lax.dynamic_slice(cut, (e, 0, c, 0), (1, O, 1, lanes)).reshape(O, 1, lanes)
        total = total + piece * x[None, :, c]
    # Always true, but XLA does not know: it would move the chain into its library's reduction, which reads slices that
    # are copied out first.
    return jnp.sum(jnp.where(e >= 0, total, 0.0), axis=-1)
