"""The operations that a compiler cannot spread over a mesh by itself, each run device by device (``jax.shard_map``).

Without an ambient mesh each is the plain operation. With one:

    embed                 vocabulary over tensor (columns, where tensor does not divide it)
    lightning             heads over tensor, time over sequence: states are exchanged
    softmax               heads over tensor, time over sequence: exchanged for heads and back
    experts               tokens gathered over expert and tensor, each device does its experts, sums scattered back; or
                          tokens sent over expert to their experts alone
    log_probs             vocabulary over tensor, time over sequence (time over both, where tensor does not divide it)
    project, project_back, expert_routes
                          decoding's products of few tokens: outputs, or inputs, over tensor
    over_words            vocabulary over tensor
    by_row                rows over tensor too
    in_parts, append_to_pages
                          slots or pages of a pool over rows, heads over tensor

Everything else in the model is left to the compiler, held in place by ``sharding.constrain``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import pallas_kernels
from m1jax.model.layers import kept
from m1jax.sharding import (
    COLUMNS,
    CUT,
    activation_axes,
    ambient_mesh,
    constrain_residual,
    cut_dimension,
    residual_axes,
    vocabulary_is_cut,
)
from pallas_kernels import Projection, target_platform
from pallas_kernels._compat import vary_over, varying_axes
from pallas_kernels.lightning import lightning_attention_sequence_parallel

MOE_ELEMENTS = 2**28  # of tokens a device has gathered at once in `experts`: bounds memory at any length


def embed(
    table: Float[Array, "vocab hidden"], tokens: Int[Array, "batch time"], dtype: jax.typing.DTypeLike, whole: bool
) -> Float[Array, "batch time hidden"]:
    """Rows of the table, in the compute dtype; ``whole`` as in ``MiniMaxM1``."""
    mesh = ambient_mesh()
    if mesh is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    rows, time = _token_axes(tokens)
    residual = residual_axes(*tokens.shape)
    cut, at, spec = _table(table, rows, () if whole else CUT)
    gather = _gather(cut, at)

    def columns(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.take(gather(table.astype(dtype)), tokens, axis=0)

    if not vocabulary_is_cut(len(table), mesh.shape):
        found = jax.shard_map(
            columns, in_specs=(P(None, ("tensor", *cut)), P(rows, time)), out_specs=P(rows, time, "tensor")
        )(table, tokens)  # fmt: skip
        return constrain_residual(found)

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        table = gather(table.astype(dtype))
        index = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        # What lies on another device is no row at all: as the first one it would be added to it a thousand times over.
        found = table.at[jnp.where(index < 0, table.shape[0], index)].get(mode="fill", fill_value=0)
        scatter = next((i for i, axes in enumerate(residual) if "tensor" in axes), None)
        return _sum(found, "tensor", scatter=scatter)

    return jax.shard_map(local, in_specs=(spec, P(rows, time)), out_specs=P(*residual, None))(table, tokens)


def with_all_of_time(function: Any, *arrays: jax.Array) -> Any:
    """``function`` of [batch, time, ...] arrays, where each device has its rows from the first token to the last.

    For sums and scatters along time: where it is cut, XLA:GPU makes them loops over single tokens.
    """
    if ambient_mesh() is None:
        return function(*arrays)
    rows = P(residual_axes(*arrays[0].shape[:2])[0])
    return jax.shard_map(function, in_specs=rows, out_specs=rows)(*arrays)


def by_row(function: Any, *arrays: Any) -> Any:
    """``function`` of [rows, ...] arrays and scalars, where each device has its rows whole: over tensor too, if it
    divides them.

    For what goes along the vocabulary: where that is cut, XLA:GPU makes a cumulative sum a loop over single words.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return function(*arrays)
    rows = activation_axes("batch", len(arrays[0]))
    if len(arrays[0]) % math.prod(mesh.shape[axis] for axis in (*rows, "tensor")) == 0:
        rows = (*rows, "tensor")
    specs = jax.tree.map(lambda x: P(rows) if jnp.ndim(x) else P(), arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=P(rows), check_vma=False)(*arrays)


def in_parts(
    function: Any, pool: Float[Array, "layers places ..."], *places: Int[Array, " n"], heads: int
) -> Float[Array, "layers places ..."]:
    """``function(pool, *places)``, a pool of slots or pages changed in ``places`` of it, where each device has its part
    of the pool and the numbers that places have in there; a negative one is none, or lies in another part.

    Left to itself XLA gathers the whole pool on every device, for it does not know which places they are. ``heads``:
    the pool's dimension over tensor.
    """
    if ambient_mesh() is None:
        return function(pool, *places)
    rows = activation_axes("batch", pool.shape[1])

    def local(pool: jax.Array, *places: jax.Array) -> jax.Array:
        count = pool.shape[1]
        first = (jax.lax.axis_index(rows) if rows else 0) * count
        return function(pool, *(jnp.where((x >= first) & (x < first + count), x - first, -1) for x in places))

    cut = P(None, rows, *[None] * (heads - 2), "tensor")
    # check_vma: which places they are differs between devices, though every device is told the same.
    return jax.shard_map(local, in_specs=(cut, *[P()] * len(places)), out_specs=cut, check_vma=False)(pool, *places)


def lightning_attention(
    q: Float[Array, "batch time heads key"],
    k: Float[Array, "batch time heads key"],
    v: Float[Array, "batch time heads value"],
    log_decay: Float[Array, " heads"],
    *,
    initial_state: Float[Array, "batch heads key value"] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch heads key value"]]:
    """``pallas_kernels.lightning_attention``, batch over rows, heads over tensor, time over sequence.

    Along sequence only one state per head and device is exchanged, whatever the length (LASP-2, arXiv 2502.07563).
    """
    ambient = ambient_mesh()
    if ambient is None:
        return pallas_kernels.lightning_attention(
            q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids
        )
    rows, time = _token_axes(q)

    def local(q: Any, k: Any, v: Any, log_decay: Any, initial_state: Any, segment_ids: Any) -> Any:
        attend = pallas_kernels.lightning_attention
        if _size(time) > 1:
            attend = functools.partial(lightning_attention_sequence_parallel, axis_name="sequence")
        return attend(q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids)

    # Over an axis of size 1 nothing differs, but only the sequence-parallel form tells shard_map so.
    time = time if ambient.shape["sequence"] > 1 else ()
    tokens = P(rows, time, "tensor", None)
    return jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, P("tensor"), P(rows, "tensor"), P(rows, time)),
        out_specs=(tokens, P(rows, "tensor")),
    )(q, k, v, log_decay, initial_state, segment_ids)


def lightning_attention_decode(
    q: Float[Array, "batch heads key"],
    k: Float[Array, "batch heads key"],
    v: Float[Array, "batch heads value"],
    log_decay: Float[Array, "*layers heads"],
    pool: Float[Array, "layers slots heads key value"],
    slots: Int[Array, " batch"] | None,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "batch heads value"], Float[Array, "layers slots heads key value"]]:
    """``pallas_kernels.lightning_attention_decode`` on one layer of a pool of states, batch and slots over rows, heads
    over tensor. The pool is updated in place.

    A row's slot must lie in the part of the pool that its device holds, as it does where row b has slot b (None).
    """
    rows = activation_axes("batch", q.shape[0])

    def local(q: Any, k: Any, v: Any, log_decay: Any, pool: Any, slots: Any, layer: Any) -> Any:
        count = pool.shape[1]
        if (
            slots is None and target_platform() == "cpu"
        ):  # neither gather nor scatter, which would take most of the time
            out, state = pallas_kernels.lightning_attention_decode(q, k, v, log_decay, pool[layer])
            return out, pool.at[layer].set(state)
        if slots is None:
            slots = jnp.asarray(np.arange(len(q), dtype=np.int32))  # a constant, not a program at every step
        else:
            first = (jax.lax.axis_index(rows) if rows else 0) * count
            slots = jnp.where(slots < 0, slots, slots - first)
        # All layers' states as one pool: the kernel takes the whole stack, and no layer is copied out of it.
        if log_decay.ndim == 2:
            return pallas_kernels.lightning_attention_decode(q, k, v, log_decay, pool, slots, layer=layer)
        slots = jnp.where(slots < 0, slots, slots + layer * count).astype(jnp.int32)
        states = pool.reshape(-1, *pool.shape[2:])
        out, states = pallas_kernels.lightning_attention_decode(q, k, v, log_decay, states, slots)
        return out, states.reshape(pool.shape)

    if ambient_mesh() is None:
        return local(q, k, v, log_decay, pool, slots, layer)
    token, states = P(rows, "tensor"), P(None, rows, "tensor")
    # check_vma: JAX 0.12 takes no array into a GPU kernel to be updated that is marked as differing between devices.
    return jax.shard_map(
        local,
        in_specs=(token, token, token, P(*[None] * (log_decay.ndim - 1), "tensor"), states, P(rows), P()),
        out_specs=(token, states),
        check_vma=False,
    )(q, k, v, log_decay, pool, slots, jnp.asarray(layer))


def softmax_attention(
    q: Float[Array, "batch time heads channels"],
    k: Float[Array, "batch keys kv_heads channels"],
    v: Float[Array, "batch keys kv_heads channels"],
    *,
    segment_ids: Int[Array, "batch time"] | None = None,
    q_start: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch time heads channels"]:
    """``pallas_kernels.softmax_attention``, batch over rows, heads over tensor, time over sequence.

    Heads instead of time inside, so that packed segments and causality cost what they cost on one device, and every
    device has the same share of the causal triangle. Key/value heads that are too few to share out are gathered.
    """
    if ambient_mesh() is None:
        return pallas_kernels.softmax_attention(q, k, v, segment_ids=segment_ids, q_start=q_start)
    rows, time = _token_axes(q)
    group = q.shape[2] // k.shape[2]

    def keys(x: jax.Array, heads: int) -> jax.Array:
        """The key/value heads that belong to this device's ``heads`` query heads, at all times."""
        parts = _size(time)
        if parts > 1 and q_start is None and x.shape[2] % parts == 0:
            return _time_to_heads(x, time)
        if q_start is None:
            x = _all_gather(x, time, 1)
        if parts == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(time) * heads // group, max(1, heads // group), 2)

    def local(q: Any, k: Any, v: Any, segment_ids: Any, q_start: Any) -> Any:
        q = _time_to_heads(q, time)
        k, v = keys(k, q.shape[2]), keys(v, q.shape[2])
        if _size(time) > 1:  # kept instead of what they came from, they are exchanged once
            q, k, v = map(kept, (q, k, v))
        return _heads_to_time(pallas_kernels.softmax_attention(q, k, v, segment_ids=segment_ids, q_start=q_start), time)

    tokens = P(rows, time, "tensor", None)
    cached = P(rows, None if q_start is not None else time, "tensor", None)
    # check_vma: JAX's kernels for TPU do not say over which axes their results differ.
    return jax.shard_map(
        local, in_specs=(tokens, cached, cached, P(rows, None), P(rows)), out_specs=tokens, check_vma=False
    )(q, k, v, segment_ids, q_start)  # fmt: skip


def append_to_pages(
    function: Any,
    pools: tuple[Float[Array, "layers pages page_size kv_heads channels"], ...],
    pages: Int[Array, "batch pages_of_row"],
    new: tuple[Float[Array, "batch time kv_heads channels"], ...],
    positions: Int[Array, "batch time"],
    segment_ids: Int[Array, "batch time"] | None,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "layers pages page_size kv_heads channels"], ...]:
    """``function`` of these, batch and pages over rows, heads over tensor: what is new in a row is written where its
    pages lie, and pages are numbered from the first of their part. A row's pages must lie in the part of the pool that
    its device holds. Left to itself XLA has every device look at all rows."""
    rows = activation_axes("batch", len(pages))

    def local(pools: Any, pages: Any, *rest: Any) -> Any:
        first = (jax.lax.axis_index(rows) if rows else 0) * pools[0].shape[1]
        return function(pools, jnp.where(pages < 0, pages, pages - first), *rest)

    if ambient_mesh() is None:
        return function(pools, pages, new, positions, segment_ids, layer)
    pool, row = P(None, rows, None, "tensor"), P(rows)
    return jax.shard_map(
        local, in_specs=(pool, row, P(rows, None, "tensor"), row, row, P()), out_specs=pool, check_vma=False
    )(pools, pages, new, positions, segment_ids, jnp.asarray(layer))  # fmt: skip


def softmax_attention_decode(
    q: Float[Array, "batch heads channels"],
    keys: Float[Array, "layers pages page_size kv_heads channels"],
    values: Float[Array, "layers pages page_size kv_heads channels"],
    pages: Int[Array, "batch pages_of_row"] | None,
    lengths: Int[Array, " batch"],
    layer: int | Int[Array, ""],
) -> Float[Array, "batch heads channels"]:
    """``pallas_kernels.softmax_attention_decode`` on one layer of a pool of pages, batch and pages over rows, heads
    over tensor. A row's pages must lie in the part of the pool that its device holds; None: row b has page b."""
    rows = activation_axes("batch", q.shape[0])

    def local(q: Any, keys: Any, values: Any, pages: Any, lengths: Any, layer: Any) -> Any:
        count = keys.shape[1]
        if pages is None:
            pages = jnp.arange(len(q), dtype=jnp.int32)[:, None]
        elif rows:
            pages = pages - jax.lax.axis_index(rows) * count
        # All layers' pages as one pool: the kernel takes the whole stack, and no layer is copied out of it.
        pages = (jnp.maximum(pages, 0) + layer * count).astype(jnp.int32)
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in (keys, values))
        return pallas_kernels.softmax_attention_decode(q, keys, values, pages, lengths)

    if ambient_mesh() is None:
        return local(q, keys, values, pages, lengths, layer)
    token, pool = P(rows, "tensor"), P(None, rows, None, "tensor")
    return jax.shard_map(
        local, in_specs=(token, pool, pool, P(rows), P(rows), P()), out_specs=token, check_vma=False
    )(q, keys, values, pages, lengths, jnp.asarray(layer))  # fmt: skip


def project(
    x: Float[Array, "batch time inputs"], projections: Sequence[Projection], layer: int | Int[Array, ""]
) -> list[Float[Array, "batch time outputs"]]:
    """``pallas_kernels.project``, batch over rows, outputs over tensor; weights are cut over nothing else."""

    def local(x: jax.Array, weights: list[jax.Array], layer: Any) -> list[jax.Array]:
        given = [p._replace(weights=w) for p, w in zip(projections, weights, strict=True)]
        return [a.reshape(*x.shape[:-1], -1) for a in pallas_kernels.project(_tokens(x), given, layer)]

    weights = [p.weights for p in projections]
    if ambient_mesh() is None:
        return local(x, weights, layer)
    rows, _ = _token_axes(x)
    specs = P(rows), P(None, "tensor"), P()
    return jax.shard_map(local, in_specs=specs, out_specs=P(rows, None, "tensor"), check_vma=False)(
        x, weights, jnp.asarray(layer)
    )


def project_back(
    x: Float[Array, "batch time inputs"], weight: Float[Array, "layers outputs inputs"], layer: int | Int[Array, ""]
) -> Float[Array, "batch time outputs"]:
    """``pallas_kernels.project`` of what `project` gave: batch over rows, inputs over tensor."""

    def local(x: jax.Array, weight: jax.Array, layer: Any) -> jax.Array:
        (product,) = pallas_kernels.project(_tokens(x), [Projection(weight)], layer)
        return product.reshape(*x.shape[:-1], -1)

    if ambient_mesh() is None:
        return local(x, weight, layer)
    rows, _ = _token_axes(x)
    specs = P(rows, None, "tensor"), P(None, None, "tensor"), P()
    return jax.shard_map(lambda *a: _sum(local(*a), "tensor"), in_specs=specs, out_specs=P(rows), check_vma=False)(
        x, weight, jnp.asarray(layer)
    )


def expert_routes(
    x: Float[Array, "batch time hidden"],
    gate: Float[Array, "layers experts hidden"],
    layer: int | Int[Array, ""],
    k: int,
) -> tuple[Int[Array, "batch time k"], Float[Array, "batch time k"]]:
    """``pallas_kernels.expert_routes``, batch over rows."""

    def local(x: jax.Array, gate: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        routes, weights = pallas_kernels.expert_routes(_tokens(x), gate, layer, k=k)
        return routes.reshape(*x.shape[:-1], k), weights.reshape(*x.shape[:-1], k)

    if ambient_mesh() is None:
        return local(x, gate, layer)
    rows = P(_token_axes(x)[0])
    return jax.shard_map(local, in_specs=(rows, P(), P()), out_specs=rows, check_vma=False)(x, gate, jnp.asarray(layer))


def over_words(
    function: Any, hidden: Float[Array, "*tokens hidden"], lm_head: Float[Array, "vocab hidden"]
) -> Float[Array, "*tokens vocab"]:
    """``function(hidden, lm_head)``, scores of words: tokens [batch] or [batch, time] over rows and sequence, the
    vocabulary over tensor, which must divide it. Left to itself XLA gathers the head where scores are wanted by row."""
    if ambient_mesh() is None:
        return function(hidden, lm_head)
    tokens = [activation_axes(name, size) for name, size in zip(("batch", "time"), hidden.shape[:-1])]
    specs = P(*tokens), P("tensor")
    return jax.shard_map(function, in_specs=specs, out_specs=P(*tokens, "tensor"), check_vma=False)(hidden, lm_head)


def experts(
    x: Float[Array, "batch time hidden"],
    w1: Float[Array, "*layers experts inner hidden"],
    w3: Float[Array, "*layers experts inner hidden"],
    w2: Float[Array, "*layers experts hidden inner"],
    routes: Int[Array, "batch time k"],
    weights: Float[Array, "batch time k"],
    layer: int | Int[Array, ""] | None = None,
    stacks: tuple[jax.Array, ...] | None = None,
) -> Float[Array, "batch time hidden"]:
    """``pallas_kernels.expert_mlp`` on all tokens; weights are cast to x's dtype. Dropless on any mesh.

    Every device sees the tokens of all devices that share its experts, computes those routed to its own experts (the
    others cost nothing) on its part of their width, and gets the sum for its own tokens back. On some GPUs it sees
    those that are routed to its own experts alone (``pallas_kernels.exchanges_tokens``).

    Given ``layer``, the weights are those of all layers of a run, from which the kernel picks without a copy; or, where
    gradients are wanted, the layer's own beside the ``stacks`` of all (not where fsdp cuts them).
    """
    mesh, weights = ambient_mesh(), weights.astype(x.dtype)
    if mesh is None:
        tokens, routes, weights = (a.reshape(-1, a.shape[-1]) for a in (x, routes, weights))
        w1, w3, w2 = (w.astype(x.dtype) for w in (w1, w3, w2))
        return _expert_mlp(tokens, routes, weights, w1, w3, w2, layer, stacks).reshape(x.shape)
    rows, time = residual_axes(*x.shape[:2])
    shared = tuple(axis for axis in ("expert", "tensor") if axis in rows + time)
    repeated = tuple(axis for axis in ("expert", "tensor") if axis not in shared)
    stack = 0 if w1.ndim == 3 else 1
    cut = ("fsdp",) if mesh.shape["fsdp"] > 1 and "fsdp" in rows else ()
    into = cut_dimension(("experts", "inner", "hidden"), w1.shape[stack:], mesh.shape)
    out = cut_dimension(("experts", "hidden", "inner"), w2.shape[stack:], mesh.shape)
    gather_in, gather_out = _gather(cut, into + stack), _gather(cut, out + stack)

    def local(x: Any, routes: Any, weights: Any, w1: Any, w3: Any, w2: Any, layer: Any, stacks: Any) -> Any:
        shape = x.shape
        if stack and cut:  # what must be gathered is cut out first
            w1, w3, w2 = (jax.lax.dynamic_slice_in_dim(w, layer, 1) for w in (w1, w3, w2))
            layer = jnp.zeros_like(layer)
        w1, w3, w2 = gather_in(w1.astype(x.dtype)), gather_in(w3.astype(x.dtype)), gather_out(w2.astype(x.dtype))
        if _size(shared) > 1:
            x, w1, w3, w2 = _gradients_together(x, *(vary_over(w, varying_axes(x, w)) for w in (w1, w3, w2)))
        first_expert = jax.lax.axis_index("expert") * w1.shape[-3]

        def some(x: Any, routes: Any, weights: Any) -> Any:
            alone = "expert" in shared and pallas_kernels.exchanges_tokens(x, w1, w3, w2, mesh.shape["expert"])
            together = tuple(axis for axis in shared if not (alone and axis == "expert"))
            x, routes, weights = (_all_gather(a, together, 0) for a in (x, routes, weights))
            if alone:
                out = _expert_mlp(x, routes, weights, w1, w3, w2, layer, stacks, "expert")
            else:
                out = _expert_mlp(x, routes - first_expert, weights, w1, w3, w2, layer, stacks)
            return _sum(_sum(out, together, scatter=0), repeated)

        count = pieces(math.prod(shape[:2]), _size(shared), shape[-1])
        return _in_pieces(some, count, x, routes, weights).reshape(shape)

    tokens = P(rows, time, None)
    own = [_with(("expert", "tensor", None), into, cut), _with(("expert", None, "tensor"), out, cut)]
    in_layer, of_run = ([P(*[None] * n, *axes) for axes in own] for n in (stack, 1))
    return jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, in_layer[0], *in_layer, P(), (of_run[0], *of_run) if stacks else P()),
        out_specs=tokens,
    )(x, routes, weights, w1, w3, w2, layer, stacks and tuple(stacks))


@jax.custom_vjp
def _gradients_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays themselves; nobody gets the gradient of one before those of all are there.

    So that XLA, which does not know how long kernels take, lets those of the weights' gradients run while the tokens'
    gradient is summed over devices.
    """
    return arrays


_gradients_together.defvjp(lambda *x: (x, None), lambda _, given: jax.lax.optimization_barrier(given))


def log_probs(
    function: Any,
    hidden: Float[Array, "batch time hidden"],
    lm_head: Float[Array, "vocab hidden"],
    targets: Int[Array, "batch time"],
    temperature: Any,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """``function(hidden, lm_head, targets, temperature, vocab_axis)`` on the part of the vocabulary of each device; or,
    where tensor does not divide the vocabulary, on all of it and a part of the tokens."""
    mesh = ambient_mesh()
    if mesh is None:
        return function(hidden, lm_head, targets, temperature, None)
    rows, time = _token_axes(hidden)
    words, axes = "tensor", CUT
    if not vocabulary_is_cut(len(lm_head), mesh.shape):
        words, axes = None, COLUMNS
        rows, time = residual_axes(*hidden.shape[:2])
    cut, at, spec = _table(lm_head, (*rows, *time), axes)
    gather = _gather(cut, at)

    def local(hidden: Any, lm_head: Any, targets: Any, temperature: Any) -> Any:
        axes = varying_axes(hidden, targets)
        whole = _with_gradient_in(hidden.dtype, lambda weight: vary_over(gather(weight), axes))
        return function(hidden, whole(lm_head), targets, temperature, words)

    tokens = P(rows, time)
    return jax.shard_map(
        local, in_specs=(P(rows, time, None), spec, tokens, P()), out_specs=(tokens, tokens)
    )(hidden, lm_head, targets, jnp.asarray(temperature, jnp.float32))  # fmt: skip


def _with_gradient_in(dtype: jax.typing.DTypeLike, function: Any) -> Any:
    """A linear ``function``, whose gradient is summed over devices in ``dtype``."""

    def backward(x: jax.Array, given: jax.Array) -> tuple[jax.Array]:
        (gradient,) = jax.vjp(function, x.astype(dtype))[1](given.astype(dtype))
        return (gradient.astype(x.dtype),)

    same = jax.custom_vjp(function)
    same.defvjp(lambda x: (function(x), x), backward)
    return same


def _expert_mlp(
    x: Any, routes: Any, weights: Any, w1: Any, w3: Any, w2: Any, layer: Any, stacks: Any, axis_name: str | None = None
) -> jax.Array:
    return pallas_kernels.expert_mlp(x, w1, w3, w2, routes, weights, layer=layer, stacks=stacks, axis_name=axis_name)


def pieces(tokens: int, devices: int, hidden: int) -> int:
    """How many equal pieces ``experts`` cuts a device's own tokens into, each gathered with those of other devices."""
    count = -(-tokens * devices * hidden // MOE_ELEMENTS)
    while tokens % count:  # no piece smaller than the others: collectives inside need one shape
        count += 1
    return count


def _in_pieces(function: Any, count: int, *arrays: jax.Array) -> jax.Array:
    """``function`` of [batch, time, ...] arrays as tokens [n, ...], in so many pieces one after the other.

    Each piece is recomputed for its gradient. Where the layer is rematerialised too, that costs nothing: its own
    recomputation has no use for the experts' output.
    """
    flat = [a.reshape(-1, a.shape[-1]) for a in arrays]
    if count == 1:
        return function(*flat)
    split = [a.reshape(count, -1, a.shape[-1]) for a in flat]
    return jax.lax.map(lambda piece: jax.checkpoint(function)(*piece), tuple(split))


def _tokens(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _token_axes(x: jax.Array) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that batch and time of an array [batch, time, ...] are cut over."""
    batch, time = x.shape[:2]
    return activation_axes("batch", batch), activation_axes("time", time)


def _gather(axes: tuple[str, ...], dimension: int) -> Any:
    """The function that makes a weight whole inside a shard_map that it enters cut over ``axes``.

    Along axes that tokens are spread over, its gradient is summed and cut in one reduce-scatter by being gathered
    inside. Along the others (a batch too small to share out) it must enter whole: its gradient is no sum.
    """
    return functools.partial(_all_gather, axes=axes, dimension=dimension)


def _with(entries: tuple[str | None, ...], dimension: int, axes: tuple[str, ...]) -> list[Any]:
    """A PartitionSpec's entries, one of them cut over more axes."""
    return [(*([own] if own else []), *axes) if at == dimension and axes else own for at, own in enumerate(entries)]


def _table(table: jax.Array, rows: tuple[str, ...], axes: tuple[str, ...]) -> tuple[tuple[str, ...], int, P]:
    """How a table of words that is cut over ``axes`` enters a shard_map whose tokens are spread over ``rows``: the axes
    it is gathered over inside, along which dimension, and its spec."""
    mesh = ambient_mesh()
    assert mesh is not None
    inside = tuple(axis for axis in axes if axis in rows)
    if not vocabulary_is_cut(len(table), mesh.shape):
        return inside, 1, P(None, inside)
    at = cut_dimension(("vocab", "hidden"), table.shape, mesh.shape)
    return inside, at, P(*_with(("tensor", None), at, inside))


def _size(axes: tuple[str, ...]) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _all_gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def _sum(x: jax.Array, axes: str | tuple[str, ...], scatter: int | None = None) -> jax.Array:
    if not axes:
        return x
    if scatter is None:
        return jax.lax.psum(x, axes)
    return jax.lax.psum_scatter(x, axes, scatter_dimension=scatter, tiled=True)


def _time_to_heads(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[B, T/n, H, D] -> [B, T, H/n, D]: every device gets all of time for its part of the heads."""
    return jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True) if axes else x


def _heads_to_time(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True) if axes else x
