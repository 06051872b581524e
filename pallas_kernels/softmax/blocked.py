"""Flash attention in plain XLA: block by block, nothing of size T x S, forward and backward.

Blocks that causality or the segments hide are not computed: the loop over key blocks has dynamic bounds. The backward
pass recomputes the weights of a block from the queries, keys and the saved log-sum-exp (Dao 2023, arXiv 2307.08691).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import ladder, target
from pallas_kernels._compat import vary_over, varying_axes
from pallas_kernels.softmax.reference import PADDING

unsupported = ladder.always

Q_ROWS, K_BLOCK = 512, 512  # rows of a query block, all heads of a group counted; keys of a block
GPU_Q_ROWS, GPU_K_BLOCK = 4096, 1024  # two to three times faster there (experiments/attention_speed)
FLOOR = (
    -1e30
)  # start of the running maximum: finite, so that a row that has seen nothing yet gives exp(-inf) = 0, not NaN


@jax.custom_vjp
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, q_start: jax.Array | None
) -> jax.Array:
    """Shapes as in `api.softmax_attention`; o [B, T, Hq, D] in q's dtype."""
    return _forward(q, k, v, segment_ids, q_start)[0]


def _forward(q, k, v, segment_ids, q_start):
    blocks = _Blocks(q, k, segment_ids, q_start)
    B, S, Hkv, D = k.shape
    G, nq, bq = blocks.G, blocks.nq, blocks.bq
    rows = blocks.split(q)  # [nq, B, Hkv, G * bq, D]

    def query_block(i, q_i):
        def step(j, carry):
            top, total, acc = carry
            k_j, v_j = blocks.keys(k, j), blocks.keys(v, j)
            s = blocks.scores(q_i, k_j, i, j)
            new = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new[..., None])
            shrink = jnp.exp(top - new)
            total = total * shrink + p.sum(-1)
            acc = acc * shrink[..., None] + _dot("bhms,bshd->bhmd", p.astype(v.dtype), v_j)
            return new, total, acc

        shape = (B, Hkv, G * bq)
        start = blocks.vary(jnp.full(shape, FLOOR), jnp.zeros(shape), jnp.zeros((*shape, D)))
        top, total, acc = jax.lax.fori_loop(*blocks.key_range(i), step, start)
        empty = total == 0
        o = acc / jnp.where(empty, 1.0, total)[..., None]
        # +inf makes every recomputed weight of such a row zero in the backward pass.
        return o.astype(q.dtype), jnp.where(empty, jnp.inf, top + jnp.log(total))

    o, lse = jax.lax.map(lambda args: query_block(*args), (jnp.arange(nq), rows))
    return blocks.join(o), (q, k, v, segment_ids, q_start, o, lse)


def _backward(saved, do):
    q, k, v, segment_ids, q_start, o, lse = saved
    blocks = _Blocks(q, k, segment_ids, q_start)
    B, S, Hkv, D = k.shape
    bk, nk = blocks.bk, blocks.nk
    rows, do_rows = blocks.split(q), blocks.split(do)
    delta = jnp.sum(do_rows.astype(jnp.float32) * o.astype(jnp.float32), -1)

    def key_block(carry, j):
        dq, dk, dv = carry
        k_j, v_j = blocks.keys(k, j), blocks.keys(v, j)

        def step(i, carry):
            dq, dk_j, dv_j = carry
            q_i, do_i = rows[i], do_rows[i]
            p = jnp.exp(blocks.scores(q_i, k_j, i, j) - lse[i][..., None])
            dv_j = dv_j + _dot("bhms,bhmd->bshd", p.astype(do.dtype), do_i)
            ds = (p * (_dot("bhmd,bshd->bhms", do_i, v_j) - delta[i][..., None]) * D**-0.5).astype(q.dtype)
            dk_j = dk_j + _dot("bhms,bhmd->bshd", ds, q_i)
            return dq.at[i].add(_dot("bhms,bshd->bhmd", ds, k_j)), dk_j, dv_j

        zero = blocks.vary(jnp.zeros((B, bk, Hkv, D)), jnp.zeros((B, bk, Hkv, D)))
        dq, dk_j, dv_j = jax.lax.fori_loop(*blocks.query_range(j), step, (dq, *zero))
        at = blocks.key_start(j)
        # The last block overlaps the one before it where bk does not divide S (its shared keys are masked: zero here).
        dk = jax.lax.dynamic_update_slice_in_dim(dk, jax.lax.dynamic_slice_in_dim(dk, at, bk, 1) + dk_j, at, 1)
        dv = jax.lax.dynamic_update_slice_in_dim(dv, jax.lax.dynamic_slice_in_dim(dv, at, bk, 1) + dv_j, at, 1)
        return (dq, dk, dv), None

    zero = blocks.vary(jnp.zeros(rows.shape), jnp.zeros(k.shape), jnp.zeros(v.shape))
    (dq, dk, dv), _ = jax.lax.scan(key_block, zero, jnp.arange(nk))
    return blocks.join(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


attention.defvjp(_forward, _backward)


class _Blocks:
    """How queries and keys are cut, which blocks see each other, and the masked scores of a pair of blocks."""

    def __init__(self, q, k, segment_ids, q_start):
        B, T, Hq, D = q.shape
        S, Hkv = k.shape[1:3]
        self.B, self.T, self.S, self.Hkv, self.D, self.G = B, T, S, Hkv, D, Hq // Hkv
        on_gpu = target.target_platform() == "gpu"
        self.bq = min(T, max(1, (GPU_Q_ROWS if on_gpu else Q_ROWS) // self.G))
        self.bk = min(S, GPU_K_BLOCK if on_gpu else K_BLOCK)
        self.nq, self.nk = -(-T // self.bq), -(-S // self.bk)
        self.axes = varying_axes(q, k, segment_ids, q_start)
        self.segment_ids, self.q_start = segment_ids, q_start
        if segment_ids is not None:
            index = jnp.arange(T)
            changed = segment_ids[:, 1:] != segment_ids[:, :-1]
            edge = jnp.ones((B, 1), bool)
            first = jnp.where(jnp.concatenate([edge, changed], 1), index, 0)
            last = jnp.where(jnp.concatenate([changed, edge], 1), index, T - 1)
            padding = segment_ids == PADDING
            # Per token, the first and last position of its segment. Padding begins no work, ends with what it follows.
            self.first = jnp.where(padding, T, jax.lax.cummax(first, axis=1))
            self.last = jax.lax.cummax(jnp.where(padding, -1, jax.lax.cummin(last, axis=1, reverse=True)), axis=1)

    def vary(self, *arrays):
        """Loop carries must vary over the same mesh axes of a shard_map as the data that is added to them."""
        return tuple(vary_over(a, self.axes) for a in arrays)

    def split(self, a):
        """[B, T, Hq, D] -> [nq, B, Hkv, G * bq, D]"""
        a = jnp.pad(a, ((0, 0), (0, self.nq * self.bq - self.T), (0, 0), (0, 0)))
        a = a.reshape(self.B, self.nq, self.bq, self.Hkv, self.G, self.D)
        return a.transpose(1, 0, 3, 4, 2, 5).reshape(self.nq, self.B, self.Hkv, self.G * self.bq, self.D)

    def join(self, a):
        """The inverse of `split`."""
        a = a.reshape(self.nq, self.B, self.Hkv, self.G, self.bq, self.D).transpose(1, 0, 4, 2, 3, 5)
        return a.reshape(self.B, self.nq * self.bq, self.Hkv * self.G, self.D)[:, : self.T]

    def key_start(self, j):
        return jnp.minimum(j * self.bk, self.S - self.bk)

    def keys(self, a, j):
        """Block j of keys or values, [B, bk, Hkv, D]."""
        return jax.lax.dynamic_slice_in_dim(a, self.key_start(j), self.bk, 1)

    def key_range(self, i):
        """The key blocks that some query of block i sees."""
        last = jnp.minimum((i + 1) * self.bq, self.T) - 1
        if self.q_start is not None:
            last = last + self.q_start.max()
        low = 0
        if self.segment_ids is not None:
            low = self.first[:, i * self.bq].min() // self.bk
        return low, jnp.minimum(last // self.bk + 1, self.nk)

    def query_range(self, j):
        """The query blocks in which some query sees a key of block j."""
        first = j * self.bk
        if self.q_start is not None:
            first = jnp.maximum(first - self.q_start.max(), 0)
        high = self.nq
        if self.segment_ids is not None:
            high = self.last[:, jnp.minimum((j + 1) * self.bk, self.S) - 1].max() // self.bq + 1
        return first // self.bq, high

    def scores(self, q_i, k_j, i, j):
        """[B, Hkv, G * bq, bk] float32, -inf where a query does not see a key."""
        s = _dot("bhmd,bshd->bhms", q_i, k_j) * self.D**-0.5
        q_index = i * self.bq + jnp.arange(self.bq)
        k_index = self.key_start(j) + jnp.arange(self.bk)
        q_pos = q_index[None] if self.q_start is None else q_index + self.q_start[:, None]
        seen = (q_pos[:, :, None] >= k_index) & (k_index >= j * self.bk) & (q_index < self.T)[:, None]
        if self.segment_ids is not None:
            q_seg = self.segment_ids[:, jnp.minimum(q_index, self.T - 1)]
            k_seg = jax.lax.dynamic_slice_in_dim(self.segment_ids, self.key_start(j), self.bk, 1)
            seen = seen & (q_seg[:, :, None] == k_seg[:, None, :]) & (q_seg != PADDING)[:, :, None]
        seen = jnp.tile(seen, (1, self.G, 1))[:, None]
        return jnp.where(seen, s, -jnp.inf)


# float32 stays float32 on every chip; products of bfloat16 need and get no more than one pass.
_dot = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
