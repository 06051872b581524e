"""The CPU's version: a loop over the experts that have tokens, and over blocks of their tokens; no other work.

Assignments are sorted by expert. An expert's weights are sliced out once, then its rows go through in blocks; the last
block runs past the expert's end, and what it writes there is overwritten by the next expert's first block. The rest of
an expert's rows takes the smallest block that holds it, so that 130 rows do not cost 256.

Weights stand on the left of every product of the forward pass and rows of tokens on the right: XLA:CPU's library takes
the left side as it lies in memory and first packs the right one, which for a few rows cost more than the product.

Decoding is another regime, in which the weights' way through memory is all that counts. XLA:CPU copies a dynamic slice
before a dot. Where most experts have a few rows, one batched product reads all of them in place instead, the idle ones
too. Where an expert has a single row, the product is written as a chain of multiply-adds over vectors, with which the
slice is fused.

Everything is float32 inside, whatever the arguments are: XLA:CPU multiplies bfloat16 some thirty times slower.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import ladder
from pallas_kernels._compat import vary_over, varying_axes

unsupported = ladder.always

BLOCKS = (8, 16, 32, 64, 128)  # rows of a product; larger or finer ones bring nothing, and each has to be compiled
TOGETHER = (4, 8)  # rows of every expert in one batched product, where most experts have some
LANES = 16  # floats that the chain keeps side by side
LINKS = 64  # at most so many links in the chain: every one is an instruction that XLA has to compile


class _Plan(NamedTuple):
    """Assignments sorted by expert: those of expert e stand at rows start[e] : start[e] + size[e]."""

    token: jax.Array  # [A] of each sorted row
    expert: jax.Array  # [A] of each sorted row; the number of experts where it has none here
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
        expert=expert[order],
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
    num_experts, assignments = w1.shape[0], routes.size
    plan = _plan(routes, num_experts)
    chain = _chain_fits(assignments, w1, w2)
    blocks = _blocks(assignments)
    rows = _sorted_rows(x, plan, blocks[-1])

    def whole(e, turn, out):
        e = e + turn
        a, b, c = (_expert(w, e) for w in (w1, w3, w2))

        def block(at, size, out):
            r = jax.lax.dynamic_slice_in_dim(rows, at, size)
            hidden = jax.nn.silu(_dot(a, r, 1, 1)) * _dot(b, r, 1, 1)
            return jax.lax.dynamic_update_slice_in_dim(out, _transposed(_dot(c, hidden, 1, 0)), at, 0)

        return _in_blocks(plan.start[e], plan.size[e], blocks, block, out)

    def expert(i, out):
        e = plan.active[i]
        size = plan.size[e]
        if chain:
            out = _when(size == 1, functools.partial(_one_row, rows, w1, w3, w2, e, plan.start[e]), out)
        return _when(size > chain, functools.partial(whole, e), out)

    out = vary_over(jnp.zeros(rows.shape, jnp.float32), varying_axes(x, w1, w3, w2, routes))
    alone = plan.count  # experts that go one by one
    if num_experts < 2 * assignments <= 2 * num_experts * TOGETHER[-1]:
        most, below = jnp.max(plan.size), 0
        for n in TOGETHER:
            fits = (most > below) & (most <= n) & (2 * plan.count > num_experts)
            out = _when(fits, functools.partial(_together, rows, w1, w3, w2, plan, n), out)
            alone, below = jnp.where(fits, 0, alone), n
    out = jax.lax.fori_loop(0, alone, expert, out)
    return _combined(out, plan, weights).astype(x.dtype)


def _forward(x, w1, w3, w2, routes, weights):
    """For a gradient: keeps the first two products of every row, which are two ninths of the work of both passes.

    They are [rows, F], as the backward pass needs them. So rows stand on the left here; in the large blocks that
    training consists of it makes no difference. The output has a loop of its own: where a layer is rematerialised,
    nobody needs it the second time, and JAX drops the loop.
    """
    plan = _plan(routes, w1.shape[0])
    blocks = _blocks(routes.size)
    rows = _sorted_rows(x, plan, blocks[-1])

    def inner(i, carry):
        e = plan.active[i]
        a, b = _expert(w1, e), _expert(w3, e)

        def block(at, size, carry):
            r = jax.lax.dynamic_slice_in_dim(rows, at, size)
            return tuple(jax.lax.dynamic_update_slice_in_dim(z, _dot(r, w, 1, 1), at, 0) for z, w in zip(carry, (a, b)))

        return _in_blocks(plan.start[e], plan.size[e], blocks, block, carry)

    def outer(i, out):
        e = plan.active[i]
        c = _expert(w2, e)

        def block(at, size, out):
            u, g = (jax.lax.dynamic_slice_in_dim(z, at, size) for z in (up, gate))
            return jax.lax.dynamic_update_slice_in_dim(out, _dot(jax.nn.silu(u) * g, c, 1, 1), at, 0)

        return _in_blocks(plan.start[e], plan.size[e], blocks, block, out)

    axes = varying_axes(x, w1, w3, w2, routes)
    up, gate, out = (
        vary_over(jnp.zeros((len(rows), width), jnp.float32), axes) for width in (w1.shape[1], w3.shape[1], w2.shape[1])
    )
    up, gate = jax.lax.fori_loop(0, plan.count, inner, (up, gate))
    out = jax.lax.fori_loop(0, plan.count, outer, out)
    return _combined(out, plan, weights).astype(x.dtype), (x, w1, w3, w2, weights, plan, up, gate)


def _combined(out: jax.Array, plan: _Plan, weights: jax.Array) -> jax.Array:
    """[N, D]: what each token takes of its experts' rows."""
    share = jnp.where(plan.valid, weights.astype(jnp.float32), 0.0)
    return jnp.einsum("nk,nkd->nd", share, out[plan.row])


def _backward(saved, dy):
    x, w1, w3, w2, weights, plan, ups, gates = saved
    blocks = _blocks(weights.size)
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
            r, dy_r, up, gate, share_r, index_r = (
                jax.lax.dynamic_slice_in_dim(z, at, size) for z in (rows, dy_rows, ups, gates, share, index)
            )
            # Rows past the expert's end are another's: they may not enter the sums over rows.
            share_r = jnp.where(index_r < end, share_r, 0.0)[:, None]
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

    axes = varying_axes(x, w1, w3, w2, weights, ups, dy)
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


def _transposed(product: jax.Array) -> jax.Array:
    """Behind a barrier: XLA:CPU would swap the operands instead, and its library takes no weights on the right."""
    return jax.lax.optimization_barrier(product).mT


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
    below, largest = (0, *blocks)[-2:]
    full = (size + largest - below - 1) // largest  # a rest that takes the largest size is a turn of the same loop
    carry = jax.lax.fori_loop(0, full, lambda i, carry: block(start + i * largest, largest, carry), carry)
    first, rest = start + full * largest, size - full * largest
    for smaller, b in zip((0, *blocks), blocks[:-1]):
        carry = _when((rest > smaller) & (rest <= b), lambda turn, carry, b=b: block(first + turn, b, carry), carry)
    return carry


def _together(rows, w1, w3, w2, plan, n, turn, out):
    """All experts at once, each with the n rows from its first on; those that are another's are not read again."""
    num_experts, assignments = w1.shape[0], plan.expert.size
    r = rows[plan.start[:, None] + turn + jnp.arange(n)]
    a, b, c = (w.astype(jnp.float32) for w in (w1, w3, w2))
    hidden = jax.nn.silu(jnp.einsum("efd,end->efn", a, r)) * jnp.einsum("efd,end->efn", b, r)
    y = _transposed(jnp.einsum("edf,efn->edn", c, hidden))
    expert = jnp.minimum(plan.expert, num_experts - 1)
    found = y[expert, jnp.arange(assignments) - plan.start[expert]]
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(plan.expert[:, None] < num_experts, found, 0.0), 0, 0)


def _chain_fits(assignments: int, w1: jax.Array, w2: jax.Array) -> bool:
    """Whether the chain of multiply-adds is compiled: when decoding, if the sizes allow vectors."""
    return not (assignments > 128 or w1.shape[2] % LANES or w2.shape[2] % LANES or w1.dtype != jnp.float32)


def _one_row(rows, w1, w3, w2, e, start, turn, out):
    e, start = e + turn, start + turn
    r = jax.lax.dynamic_index_in_dim(rows, start, keepdims=False)
    hidden = jax.nn.silu(_chain(w1, e, r)) * _chain(w3, e, r)
    return jax.lax.dynamic_update_index_in_dim(out, _chain(w2, e, hidden), start, 0)


def _chain(w: jax.Array, e: jax.Array, x: jax.Array) -> jax.Array:
    """w[e] @ x [O] for w [E, O, I] and x [I], reading w in place."""
    E, O, I = w.shape
    lanes = next(m for m in range(LANES, I + 1, LANES) if I % m == 0 and I // m <= LINKS)
    cut, x = w.reshape(E, O, I // lanes, lanes), x.reshape(I // lanes, lanes)
    total = jnp.zeros(())
    for c in range(I // lanes):
        piece = jax.lax.dynamic_slice(cut, (e, 0, c, 0), (1, O, 1, lanes)).reshape(O, lanes)
        total = total + piece * x[c]
    # Always true, but XLA does not know: it would move the chain into its library's reduction, which reads slices that
    # are copied out first.
    return jnp.sum(jnp.where(e >= 0, total, 0.0), axis=-1)
