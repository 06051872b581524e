"""One scan over the tokens on a Hopper GPU (Pallas, Mosaic GPU): what forward and backward are both made of.

    forward in time:    S = lam S + k_t^T v_t,  o_t = q_t S
    backward in time:   S = S + k_t^T v_t,      o_t = q_t S,      S = lam S

A thread block owns one head (or half of its value columns) of one row and walks through the row's chunks of 64 tokens.
Its float32 state lives in registers from the first chunk to the last and never goes to memory. Per chunk, with n real
tokens and 0 <= i < 64 (forward in time; backward in time w and u change places and j <= i becomes j >= i):

    o_i = sum_{j <= i} lam^(i-j) (q_i k_j) v_j + w_i q_i S       w_i = lam^(i+1)
    S   = lam^n S + sum_j u_j k_j^T v_j                          u_j = lam^(n-1-j)

Decays are only ever raised to powers >= 0, so no slope overflows. Warpgroups: one computes outputs, one (or two, of 64
value columns each) keeps the state, one drives the copy engine. docs/kernels-hopper.md tells why, and counts bytes and
operations.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper
from pallas_kernels.lightning.segments import is_real

CHUNK = 64
META = 128
"""int32 per chunk: CHUNK bounds of rows, the chunk's own bound, its count of real tokens, unused."""


@dataclasses.dataclass(frozen=True)
class Role:
    """Which of a scan's arrays a block reads as q, k and v, and whether it returns its last state."""

    q: int
    k: int
    v: int
    final: bool = False


def scan(
    arrays: Sequence[jax.Array],
    roles: Sequence[Role],
    log_decay: jax.Array,
    initial: Sequence[jax.Array | None],
    segment_ids: jax.Array | None,
    *,
    length: int,
    reverse: bool,
    splits: int = 1,
    interpret=False,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Lightning attention, forward or backward in time.

    Args:
      arrays: bfloat16 [B,T,H,D], D in (64, 128), T a multiple of 8.
      roles: one; or two that run side by side in a pair of blocks, of which each one's k is the other's v, so that both
        arrays come from memory once.
      log_decay: [H] float32.
      initial: for each role the transposed state [B,H,V,K] float32 before the first token of the walk; None for zeros.
      segment_ids: [B,T] int32 as in `lightning_attention`, or None.
      length: how many of the T tokens are there; zeros must stand behind them.
      reverse: walk from the last token to the first.
      splits: with one role and D = 128: among how many blocks (1 or 2) a head's value columns are divided.
      interpret: run in Pallas' CPU interpreter (True or its InterpretGPUParams).

    Returns:
      For each role the outputs [B,T,H,D] bfloat16, and for each role that asks for it the transposed state [B,H,V,K]
      float32 after the walk's last token.
    """
    batch, _, heads, size = arrays[0].shape
    two_roles = len(roles) == 2
    parts = splits * len(roles)
    width = size // splits
    chunks = pl.cdiv(length, CHUNK)
    chunk_facts = None if segment_ids is None else metadata(segment_ids, reverse)
    given = [s for s in initial if s is not None]
    inputs = (*arrays, log_decay, *given, *(() if chunk_facts is None else (chunk_facts,)))
    finals = sum(role.final for role in roles)
    # What both blocks of a pair read, in the places 0 and 1, and what each block reads for itself.
    shared = (roles[0].k, roles[0].v) if two_roles else (roles[0].q, roles[0].k)
    own = [role.q if two_roles else role.v for role in roles]
    # On the chip the two blocks form a cluster and each fetches half of what both read, for both.
    paired = parts == 2 and not interpret
    state_groups = width // 64
    # What 227 KB of shared memory have room for.
    stages, state_buffers = (4, 2) if state_groups == 1 else (3, 1)
    output_registers, state_registers = (232, 232) if state_groups == 1 else (208, 136)
    ops = _hopper.operations(interpret)

    def body(*refs):
        refs = list(refs)

        def take(n):
            return [refs.pop(0) for _ in range(n)]

        array_refs, (decay_ref,) = take(len(arrays)), take(1)
        given_refs = take(len(given))
        initial_refs = [None if s is None else given_refs.pop(0) for s in initial]
        (meta_ref,) = take(1) if chunk_facts is not None else (None,)
        output_refs, final_refs = take(len(roles)), take(finals)
        final_refs = [final_refs.pop(0) if role.final else None for role in roles]
        shared_smem, own_smem, state_smem, weighted_smem, o_smem, meta_smem, full, empty, state_full, state_empty = refs

        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        group = lax.axis_index("group")
        log_lam = decay_ref[head]
        columns = pl.ds(part * width, width) if splits > 1 else pl.ds(0, width)

        def operands(slot):
            """The chunk's q, k and v in shared memory."""
            if two_roles:
                return own_smem.at[slot], shared_smem.at[slot, part], shared_smem.at[slot, 1 - part]
            return shared_smem.at[slot, 0], shared_smem.at[slot, 1], own_smem.at[slot]

        def chunk_of(step):
            return chunks - 1 - step if reverse else step

        def in_role(function):
            """Runs function(i) for the role i of this block; with one role, without a branch."""
            if two_roles:
                for i in range(2):
                    pl.when(part == i)(functools.partial(function, i))
            else:
                function(0)

        def real_tokens(step, slot):
            """How many of the chunk's tokens are there (a scalar)."""
            if meta_ref is not None:
                return meta_smem[slot, CHUNK + 1]
            return jnp.minimum(length - chunk_of(step) * CHUNK, CHUNK)

        def produce():
            together = {"collective_axes": "part"} if paired else {}

            def fetch(step, slot):
                rows = pl.ds(chunk_of(step) * CHUNK, CHUNK)
                for place, source in enumerate(shared):
                    copy = array_refs[source].at[row, rows, head], shared_smem.at[slot, place], full.at[slot]
                    plgpu.copy_gmem_to_smem(*copy, **together)

                def fetch_own(i):
                    source = array_refs[own[i]].at[row, rows, head, columns]
                    plgpu.copy_gmem_to_smem(source, own_smem.at[slot], full.at[slot])

                in_role(fetch_own)
                if meta_ref is not None:
                    plgpu.copy_gmem_to_smem(meta_ref.at[row, chunk_of(step)], meta_smem.at[slot], full.at[slot])

            @pl.loop(0, min(stages, chunks))
            def _(step):
                fetch(step, step)

            @pl.loop(stages, max(chunks, stages))
            def _(step):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(empty.at[slot])
                fetch(step, slot)

            # A block may not leave while the other of its pair still writes to it.
            for step in range(max(chunks - stages, 0), chunks):
                plgpu.barrier_wait(empty.at[step % stages])

        def keep_state(index):
            """Columns [64 index, 64 index + 64) of this block's; the state is transposed, [64,K]."""
            mine = pl.ds(64 * index, 64)
            here = pl.ds(part * width + 64 * index, 64) if splits > 1 else mine

            def first_state(i):
                ref = initial_refs[i]
                if ref is None:
                    return ops.zeros((64, size))
                # Under shard_map what is read is marked as differing between devices, what is computed from it is not,
                # and a loop's carry must not change its type: so compute.
                return ops.load(ref.at[row, head, here]) * 1.0

            if two_roles and given:
                state = lax.cond(part == 0, lambda: first_state(0), lambda: first_state(1))
            else:
                state = first_state(0)

            def advance(step, state):
                slot = lax.rem(step, jnp.int32(stages))
                buffer = lax.rem(step, jnp.int32(state_buffers))
                _, k, v = operands(slot)
                plgpu.barrier_wait(full.at[slot])
                n = real_tokens(step, slot)
                bound = None if meta_ref is None else meta_smem[slot, CHUNK]
                weights, kept = passing_on(ops, log_lam, chunk_of(step), n, bound, reverse)
                weighted = v[:, mine].astype(jnp.float32) * ops.down(weights, (CHUNK, 64))
                weighted_smem[:, mine] = weighted.astype(jnp.bfloat16)
                plgpu.commit_smem()
                rounded = state.astype(jnp.bfloat16)

                def publish():
                    plgpu.barrier_wait(state_empty.at[buffer])
                    state_smem[buffer, mine] = rounded
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(state_full.at[buffer])

                state = ops.onto(kept * state, weighted_smem.at[:, mine], k, transpose_a=True, meanwhile=publish)
                plgpu.commit_smem()  # Of what it does, only that all four warps have come so far matters here.
                plgpu.barrier_arrive(empty.at[slot])
                return state

            state = lax.fori_loop(0, chunks, advance, state)
            for buffer in range(state_buffers):
                plgpu.barrier_wait(state_empty.at[buffer])

            def write_final(i):
                if final_refs[i] is not None:
                    final_refs[i][row, head, here] = state

            in_role(write_final)

        def write_outputs():
            r, c = (ops.iota((CHUNK, CHUNK), axis) for axis in (0, 1))
            age = c - r if reverse else r - c
            decay = jnp.where(age >= 0, jnp.exp(log_lam * jnp.maximum(age, 0).astype(jnp.float32)), 0.0)
            for buffer in range(state_buffers):
                plgpu.barrier_arrive(state_empty.at[buffer])

            @pl.loop(0, chunks)
            def _(step):
                slot = lax.rem(step, jnp.int32(stages))
                buffer = lax.rem(step, jnp.int32(state_buffers))
                start = chunk_of(step) * CHUNK
                q, k, v = operands(slot)
                plgpu.barrier_wait(full.at[slot])
                n = real_tokens(step, slot)
                weights = _powers(ops, log_lam, n, leaving=reverse)
                bound = None
                if meta_ref is not None:
                    bound = ops.load(meta_smem.at[slot, pl.ds(0, CHUNK)], rows=True)
                    weights = jnp.where(_goes_on(bound, chunk_of(step), reverse), weights, 0.0)

                def look_back(within, before):
                    ops.wgmma(within, q, k, transpose_b=True)
                    plgpu.barrier_wait(state_full.at[buffer])
                    ops.wgmma(before, q, state_smem.at[buffer], transpose_b=True)
                    products = ops.result(within, in_flight=1) * decay
                    if bound is not None:
                        across = ops.down(bound, (CHUNK, CHUNK)) - start
                        seen = c <= jnp.minimum(across, n - 1) if reverse else c >= across
                        products = jnp.where(seen, products, 0.0)
                    return products.astype(jnp.bfloat16), ops.result(before) * ops.down(weights, (CHUNK, width))

                products, older = ops.fresh(look_back, (CHUNK, CHUNK), (CHUNK, width))
                plgpu.barrier_arrive(state_empty.at[buffer])
                o = ops.onto(older, products, v)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # All four warps have come so far, too:
                plgpu.barrier_arrive(empty.at[slot])
                o_smem[...] = o.astype(jnp.bfloat16)
                plgpu.commit_smem()

                def write(i):
                    plgpu.copy_smem_to_gmem(o_smem, output_refs[i].at[row, pl.ds(start, CHUNK), head, columns])

                in_role(write)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == 0)
        def _():
            plgpu.set_max_registers(output_registers, action="increase")
            write_outputs()

        for index in range(state_groups):

            @pl.when(group == 1 + index)
            def _(index=index):
                plgpu.set_max_registers(state_registers, action="increase")
                keep_state(index)

        @pl.when(group == 1 + state_groups)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            produce()

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    released = {"num_arrivals": 1 + state_groups, "num_barriers": stages}
    if paired:
        grid = {"grid": (heads, batch), "grid_names": ("head", "row"), "cluster": (2,), "cluster_names": ("part",)}
        empty = plgpu.ClusterBarrier(collective_axes=("part",), **released)
    else:
        grid = {"grid": (parts, heads, batch), "grid_names": ("part", "head", "row")}
        empty = plgpu.Barrier(**released)
    outputs = plgpu.kernel(
        body,
        out_type=[
            *[jax.ShapeDtypeStruct(arrays[0].shape, jnp.bfloat16)] * len(roles),
            *[jax.ShapeDtypeStruct((batch, heads, size, size), jnp.float32)] * finals,
        ],
        scratch_types=[
            tiled((stages, 2, CHUNK, size)),
            tiled((stages, CHUNK, width)),
            tiled((state_buffers, width, size)),
            tiled((CHUNK, width)),
            tiled((CHUNK, width)),
            plgpu.SMEM((stages, META), jnp.int32),
            plgpu.Barrier(num_arrivals=3 if chunk_facts is None else 4, num_barriers=stages),
            empty,
            plgpu.Barrier(num_arrivals=state_groups, num_barriers=state_buffers),
            plgpu.Barrier(num_barriers=state_buffers),
        ],
        **grid,
        num_threads=2 + state_groups,
        thread_name="group",
        kernel_name="lightning_attention_backward_in_time" if reverse else "lightning_attention_forward_in_time",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    outputs = [_compat.vary_over(x, axes) for x in outputs]
    return outputs[: len(roles)], outputs[len(roles) :]


def passing_on(ops, log_lam, chunk, n, bound, reverse):
    """What a chunk with n real tokens does to the state: u [64] for its tokens and lam^n for the state from before.

    bound: the chunk's own, see `metadata`; None where rows are not packed.
    """
    weights = _powers(ops, log_lam, n, leaving=not reverse)
    kept = jnp.exp(log_lam * n.astype(jnp.float32))
    if bound is not None:
        i = ops.iota((CHUNK,), 0, rows=True)
        token = chunk * CHUNK + i
        weights = jnp.where(token <= bound if reverse else token >= bound, weights, 0.0)
        weights = jnp.where(i < n, weights, 0.0)
        kept = jnp.where(_goes_on(bound, chunk, reverse), kept, 0.0)
    return weights, kept


def _goes_on(bound, chunk, reverse):
    """Does a segment with this bound reach into the chunk from the chunk before it in the walk?"""
    return bound >= (chunk + 1) * CHUNK if reverse else bound < chunk * CHUNK


def _powers(ops, log_lam, n, leaving):
    """[64] lam^(i+1), or, leaving the chunk in the other direction, lam^(n-1-i) (1 beyond the real tokens)."""
    i = ops.iota((CHUNK,), 0, rows=True)
    exponent = jnp.maximum(n - 1 - i, 0) if leaving else i + 1
    return jnp.exp(log_lam * exponent.astype(jnp.float32))


def metadata(segment_ids: jax.Array, reverse: bool) -> jax.Array:
    """[B, chunks, 128] int32: what the kernel must know of a chunk's segments.

    A token's bound is the first (backward in time: last) token of its segment; of the segment that the walk begins
    with, which goes on from the initial state, the token before it (behind it); of padding, one that lets nothing pass.
    The chunk's own bound is that of the last real token which the walk meets up to the chunk's end.
    """
    batch, length = segment_ids.shape
    chunks = pl.cdiv(length, CHUNK)
    far = jnp.int32(2**30)
    real = is_real(segment_ids)
    place = jnp.arange(length, dtype=jnp.int32)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((batch, 1), bool)
    if reverse:
        ends = jnp.where(jnp.concatenate([change, edge], axis=1), place, far)
        count = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None]
        bound = lax.cummin(ends, axis=1, reverse=True)
        bound = jnp.where(bound == count - 1, far, bound)
        bound = jnp.where(real, bound, -1)
        first = jnp.minimum(jnp.arange(chunks, dtype=jnp.int32) * CHUNK, length - 1)
        chunk_bound = jnp.where(real[:, first], bound[:, first], far)
    else:
        starts = jnp.where(jnp.concatenate([~edge, change], axis=1), place, -1)
        starts = lax.cummax(jnp.where(real, starts, -1), axis=1)
        bound = jnp.where(real, starts, far)
        last = jnp.minimum(jnp.arange(1, chunks + 1, dtype=jnp.int32) * CHUNK, length) - 1
        chunk_bound = starts[:, last]
    n = jnp.pad(real, ((0, 0), (0, chunks * CHUNK - length))).reshape(batch, chunks, CHUNK).sum(-1, dtype=jnp.int32)
    fill = -1 if reverse else far
    bound = jnp.pad(bound, ((0, 0), (0, chunks * CHUNK - length)), constant_values=fill)
    bound = bound.reshape(batch, chunks, CHUNK)
    rest = jnp.zeros((batch, chunks, META - CHUNK - 2), jnp.int32)
    return jnp.concatenate([bound, chunk_bound[..., None], n[..., None], rest], axis=-1)
