"""On a Hopper GPU (Pallas, Mosaic GPU): keys and values pass the chip once, at the speed of memory.

All keys of all sequences and heads stand in one line, 64 to a step, and every thread block takes an equal stretch of
it, however unequal the sequences are. A stretch may hold the end of one sequence's head, others whole and the beginning
of another: pieces. For each piece a block writes the maximum of its scores, and the sums of their exponentials and of
the values so weighted; a second kernel puts the pieces of a head together (Flash-Decoding; Dao et al. 2023).

The query heads that share a key/value head are the rows of a product, filled up to the matrix units' 64: what they
compute too much costs no time, for they wait for memory. One warpgroup has the copy engine fill a ring of stages from
the pages that the table names; two others take turns with the steps, each with its own maximum and sums.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, _hopper

_KEYS = 64
_ROWS = 64
_FLOOR = -1e30  # Below every score: finite, so that no infinities are subtracted.
_TOGETHER = 4  # Pieces that are fetched at a time to be put together.


def unsupported(q: jax.Array, keys: jax.Array, values: jax.Array, pages: jax.Array, lengths: jax.Array) -> str | None:
    """Why this implementation cannot run for these arguments (those of `api.softmax_attention_decode`), or None."""
    reason = _hopper.missing()
    if reason is not None:
        return reason
    if q.dtype != jnp.bfloat16:
        return f"it takes bfloat16: the matrix units would quietly round {q.dtype} to TF32, about three digits"
    if q.shape[-1] not in (64, 128):
        return f"it takes heads of size 64 or 128: got D = {q.shape[-1]}"
    if keys.shape[1] % _KEYS:
        return f"it takes pages of a multiple of {_KEYS} tokens: got {keys.shape[1]}"
    if q.shape[1] > _ROWS * keys.shape[2]:
        return f"it takes at most {_ROWS} query heads to a key/value head: got {q.shape[1]} and {keys.shape[2]}"
    return None


def decode(q, keys, values, pages, lengths, *, interpret=False):
    """Shapes as in `api.softmax_attention_decode`; o [B,Hq,D] bfloat16."""
    batch, heads, size = q.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    blocks = 3 if interpret else _hopper.MULTIPROCESSORS
    steps = -(-lengths // _KEYS)
    begin = (jnp.cumsum(steps) - steps) * kv_heads  # Where a row's first head begins in the line.
    total = steps.sum() * kv_heads
    quota = jnp.maximum(-(-total // blocks), 1)
    # The heads [B * Hkv] at both ends of a block's stretch; `last` is before `first` where it is empty.
    low = jnp.minimum(jnp.arange(blocks, dtype=jnp.int32) * quota, total)
    high = jnp.minimum(low + quota, total)
    first, last = (_head_at(place, begin, steps, kv_heads) for place in (low, high - 1))
    stretches = jnp.stack([low, high, first, jnp.where(high > low, last - first + 1, 0)], axis=1).astype(jnp.int32)
    rows = jnp.stack([begin, steps, lengths], axis=1).astype(jnp.int32)
    queries = q.reshape(batch, kv_heads, group, size)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, _ROWS - group), (0, 0)))
    sums, stats = _attend(queries, keys, values, pages, rows, stretches, group, interpret=interpret)
    # Where the pieces of a row's head are: see `_attend`.
    place = begin[:, None] + jnp.arange(kv_heads, dtype=jnp.int32) * steps[:, None]
    head = jnp.arange(batch * kv_heads, dtype=jnp.int32).reshape(batch, kv_heads)
    end = jnp.where(steps[:, None] > 0, (place + steps[:, None] - 1) // quota + head + 1, 0)
    ranges = jnp.stack([place // quota + head, end], axis=2).astype(jnp.int32)
    return _combine(sums, stats, ranges, heads, q.dtype, interpret=interpret)


def _head_at(place, begin, steps, kv_heads):
    """The head, numbered through all rows, that a place in the line belongs to."""
    ends = begin + steps * kv_heads
    row = jnp.minimum(jnp.sum(ends <= place[:, None], axis=1), steps.shape[0] - 1)
    return row * kv_heads + (place - begin[row]) // jnp.maximum(steps[row], 1)


def _attend(q, keys, values, pages, rows, stretches, group, *, interpret):
    """Attention over pieces; that of block i to head j is piece i + j: either grows from a piece to the next.

    Args:
      q: [B,Hkv,64,D], of each head's rows `group` real ones.
      rows: [B,3] int32: where in the line the row begins, the steps of each of its heads, its tokens.
      stretches: [blocks,4] int32: where in the line a block begins and ends, its first head, how many heads it has.

    Returns:
      For each piece and warpgroup the sums [pieces,2,G,D] float32, G = `group` filled up to a multiple of 8; the maxima
      (in powers of two) and the sums of exponentials [pieces,2,2,64] float32.
    """
    batch, kv_heads, _, size = q.shape
    page_size = keys.shape[1]
    blocks = stretches.shape[0]
    stages = 4 if size == 128 else 8
    filled = -(-group // 8) * 8
    pieces = blocks + batch * kv_heads
    scale = math.log2(math.e) / math.sqrt(size)
    ops = _hopper.operations(interpret)

    def body(
        q_ref, k_ref, v_ref, pages_ref, rows_ref, stretches_ref, sums_ref, stats_ref,
        q_smem, k_smem, v_smem, sums_smem, q_full, q_empty, k_full, v_full, empty
    ):  # fmt: skip
        block, warpgroup = lax.axis_index("block"), lax.axis_index("group")
        low, high = stretches_ref[block, 0], stretches_ref[block, 1]
        first_head = stretches_ref[block, 2]

        def each(do):
            """do(row, head, piece, first, count, done, number) for this block's pieces, in order.

            `first` is the piece's first step, `count` its steps; before it were `done` steps and `number` pieces.
            """

            def one(index, carry):
                done, number = carry
                head = first_head + index
                row, kv_head = lax.div(head, jnp.int32(kv_heads)), lax.rem(head, jnp.int32(kv_heads))
                steps = rows_ref[row, 1]
                begin = rows_ref[row, 0] + kv_head * steps
                first = jnp.maximum(low - begin, 0)
                count = jnp.maximum(jnp.minimum(high - begin, steps) - first, 0)

                @pl.when(count > 0)
                def _():
                    do(row, kv_head, block + head, first, count, done, number)

                return done + count, number + jnp.minimum(count, 1)

            lax.fori_loop(0, stretches_ref[block, 3], one, (jnp.int32(0), jnp.int32(0)))

        def fetch(row, head, piece, first, count, done, number):
            buffer = lax.rem(number, jnp.int32(2))
            plgpu.barrier_wait(q_empty.at[buffer])
            plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[buffer], q_full.at[buffer])

            @pl.loop(0, count)
            def _(step):
                stage = lax.rem(done + step, jnp.int32(stages))
                key = (first + step) * _KEYS
                page = pages_ref[row, lax.div(key, jnp.int32(page_size))]
                inside = pl.ds(lax.rem(key, jnp.int32(page_size)), _KEYS)
                plgpu.barrier_wait(empty.at[stage])
                plgpu.copy_gmem_to_smem(k_ref.at[page, inside, head], k_smem.at[stage], k_full.at[stage])
                plgpu.copy_gmem_to_smem(v_ref.at[page, inside, head], v_smem.at[stage], v_full.at[stage])

        def attend(mine, row, head, piece, first, count, done, number):
            buffer = lax.rem(number, jnp.int32(2))
            plgpu.barrier_wait(q_full.at[buffer])
            # Every second step is this warpgroup's: those whose number through all pieces is even, or odd.
            ahead = lax.rem(done + mine, jnp.int32(2))
            length = rows_ref[row, 2]
            column, key_row = ops.iota((_ROWS, _KEYS), 1), ops.iota((_KEYS, size), 0)

            def advance(index, carry):
                top, total, acc = carry
                step = ahead + 2 * index
                stage = lax.rem(done + step, jnp.int32(stages))
                there = length - (first + step) * _KEYS
                plgpu.barrier_wait(k_full.at[stage])

                def score(out):
                    ops.wgmma(out, q_smem.at[buffer], k_smem.at[stage], transpose_b=True)
                    return ops.result(out)

                scores = ops.fresh(score, (_ROWS, _KEYS))
                scores = jnp.where(column < there, scores * scale, -jnp.inf)
                new = jnp.maximum(top, scores.max(axis=1))
                shrink = jnp.exp2(top - new)
                weights = jnp.exp2(scores - ops.down(new, (_ROWS, _KEYS)))
                total = total * shrink + weights.sum(axis=1)
                plgpu.barrier_wait(v_full.at[stage])

                # What nobody wrote may be no number, even times zero.
                @pl.when(there < _KEYS)
                def _():
                    value = v_smem[stage]
                    v_smem[stage] = jnp.where(key_row < there, value, jnp.zeros_like(value))
                    plgpu.commit_smem()

                acc = ops.onto(acc * ops.down(shrink, (_ROWS, size)), weights.astype(jnp.bfloat16), v_smem.at[stage])
                plgpu.commit_smem()  # Of what it does, only that all four warps have come so far matters here.
                plgpu.barrier_arrive(empty.at[stage])
                return new, total, acc

            start = (ops.zeros((_ROWS,), rows=True) + _FLOOR, ops.zeros((_ROWS,), rows=True), ops.zeros((_ROWS, size)))
            top, total, acc = lax.fori_loop(0, lax.div(count - ahead + 1, jnp.int32(2)), advance, start)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_empty.at[buffer])
            sums_smem[mine] = acc
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_smem.at[mine, pl.ds(0, filled)], sums_ref.at[piece, mine])
            ops.store(stats_ref.at[piece, mine, 0], top)
            ops.store(stats_ref.at[piece, mine, 1], total)

        for mine in range(2):

            @pl.when(warpgroup == mine)
            def _(mine=mine):
                plgpu.set_max_registers(208, action="increase")
                for buffer in range(2):
                    plgpu.barrier_arrive(q_empty.at[buffer])
                for stage in range(mine, stages, 2):
                    plgpu.barrier_arrive(empty.at[stage])
                each(functools.partial(attend, mine))
                plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            each(fetch)

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_hopper.TILED)
    inputs = (q, keys, values, pages, rows, stretches)
    outputs = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((pieces, 2, filled, size), jnp.float32),
            jax.ShapeDtypeStruct((pieces, 2, 2, _ROWS), jnp.float32),
        ],
        scratch_types=[
            tiled((2, _ROWS, size)),
            tiled((stages, _KEYS, size)),
            tiled((stages, _KEYS, size)),
            plgpu.SMEM(
                (2, _ROWS, size), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
            ),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        kernel_name="softmax_attention_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    axes = _compat.varying_axes(*inputs)
    return [_compat.vary_over(x, axes) for x in outputs]


def _combine(sums, stats, ranges, heads, dtype, *, interpret):
    """o [B,Hq,D]: the pieces of each head put together.

    ranges: [B,Hkv,2] int32, a head's first piece and the one behind its last.
    """
    batch, kv_heads, _ = ranges.shape
    group, size = heads // kv_heads, sums.shape[-1]
    sums, stats = (x.reshape(-1, *x.shape[2:]) for x in (sums, stats))
    ops = _hopper.operations(interpret)
    layout = {"threads": True} if size == 128 else {"columns": True}

    def body(sums_ref, stats_ref, ranges_ref, o_ref):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        kv_head, place = lax.div(head, jnp.int32(group)), lax.rem(head, jnp.int32(group))
        # Two warpgroups wrote each piece.
        first, end = 2 * ranges_ref[row, kv_head, 0], 2 * ranges_ref[row, kv_head, 1]

        def take(index, carry):
            top, total, acc = carry
            some = []
            for i in range(_TOGETHER):
                one = first + index * _TOGETHER + i
                there = one < end
                one = jnp.minimum(one, end - 1)
                some.append(
                    (
                        jnp.where(there, stats_ref[one, 0, place], _FLOOR),
                        jnp.where(there, stats_ref[one, 1, place], 0.0),
                        ops.load(sums_ref.at[one, place], **layout),
                    )
                )
            new = functools.reduce(jnp.maximum, (piece[0] for piece in some), top)
            shrink = jnp.exp2(top - new)
            total, acc = total * shrink, acc * shrink
            for piece_top, piece_total, piece_acc in some:
                weight = jnp.exp2(piece_top - new)
                total, acc = total + piece_total * weight, acc + piece_acc * weight
            return new, total, acc

        start = (jnp.float32(_FLOOR), jnp.float32(0), ops.zeros((size,), **layout))
        count = lax.div(jnp.maximum(end - first, 0) + _TOGETHER - 1, jnp.int32(_TOGETHER))
        _, total, acc = lax.fori_loop(0, count, take, start)
        o = acc * (1 / jnp.where(total == 0, 1.0, total))
        ops.store(o_ref.at[row, head], o.astype(dtype))

    inputs = (sums, stats, ranges)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads, size), dtype),
        grid=(heads, batch),
        grid_names=("head", "row"),
        num_threads=1,
        thread_name="group",
        kernel_name="softmax_attention_decode_combine",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_compat.gpu_interpreter(interpret),
    )(*inputs)
    return _compat.vary_over(out, _compat.varying_axes(*inputs))
