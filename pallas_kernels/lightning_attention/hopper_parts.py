"""Long rows of few heads, cut into parts that a Hopper GPU walks through side by side.

One walk per head leaves most multiprocessors idle where there are few heads (8 per device under tensor parallelism).
So the tokens of a row are cut into parts of equal length; what the parts need of each other is one state per head,
summed here by plain matrix products (bfloat16 operands, float32 sums) before the kernels run. It is the scheme of
LASP-2 (arXiv 2502.07563) with a decay, on one device.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._hopper import MULTIPROCESSORS
from pallas_kernels.lightning_attention.segments import is_real

SHORTEST = 1024
"""Tokens below which a part is not worth its state."""
FEWEST = 4
"""Parts below which walking side by side gains less than the sums cost (measured: two lose, four win)."""


class Parts:
    """How rows are cut, and the states between the parts."""

    def __init__(
        self, log_decay: jax.Array, segment_ids: jax.Array | None, batch: int, length: int, blocks_per_row: int
    ):
        """blocks_per_row: how many thread blocks walk through a row that is not cut."""
        self.batch, self.count = batch, 1
        while (
            2 * self.count * batch * blocks_per_row <= MULTIPROCESSORS
            and length % (2 * self.count * 64) == 0
            and length // (2 * self.count) >= SHORTEST
        ):
            self.count *= 2
        if self.count < FEWEST:
            self.count = 1
        self.segment_ids = None if segment_ids is None else self.cut(segment_ids)
        if self.count == 1:
            return
        # [B or 1, parts, L, H]: the weight of a token in the state that leaves its part at the end, and, for gradients,
        # at the start; [B or 1, parts, H]: whether a state enters a part, and what becomes of it across the part.
        i = jnp.arange(length // self.count)[:, None]
        if segment_ids is None:
            self.to_end = jnp.exp((i[::-1]) * log_decay)[None, None]
            self.to_start = jnp.exp((i + 1) * log_decay)[None, None]
            self.across = jnp.broadcast_to(jnp.exp(len(i) * log_decay), (1, self.count, *log_decay.shape))
            self.enters = jnp.ones_like(self.across)
            return
        ids = segment_ids.reshape(batch, self.count, -1)
        real = is_real(ids)
        count = real.sum(-1, dtype=jnp.int32)
        first, last = ids[..., 0], jnp.where(real, ids, ids[..., :1]).max(-1)
        empty = count == 0
        before = jnp.concatenate([first[:, :1], last[:, :-1]], axis=1)
        enters = empty | (first == before)
        crosses = enters & (empty | (first == last))
        age = jnp.maximum(count[..., None, None] - 1 - i, 0)
        at_end, at_start = ((real & (ids == x[..., None]))[..., None] for x in (last, first))
        self.to_end = jnp.where(at_end, jnp.exp(age * log_decay), 0.0)
        self.to_start = jnp.where(at_start, jnp.exp((i + 1) * log_decay), 0.0)
        self.across = jnp.where(crosses[..., None], jnp.exp(count[..., None] * log_decay), 0.0)
        self.enters = enters[..., None].astype(jnp.float32)

    def cut(self, x: jax.Array) -> jax.Array:
        """[B,T,...] -> [B*parts,T/parts,...]"""
        return x.reshape(x.shape[0] * self.count, -1, *x.shape[2:])

    def join(self, x: jax.Array) -> jax.Array:
        """[B*parts,T/parts,...] -> [B,T,...]"""
        return x.reshape(self.batch, -1, *x.shape[2:])

    def states_before(self, k, v, initial_state):
        """The state [B*parts,H,K,V] before each part (None: zeros), and the one behind the row (None: unknown)."""
        if self.count == 1:
            return initial_state, None
        sums = self._sums(self.to_end, k, v)
        state = jnp.zeros_like(sums[:, 0]) if initial_state is None else initial_state
        before = []
        for part in range(self.count):
            before.append(_times(self.enters[:, part], state))
            state = _times(self.across[:, part], state) + sums[:, part]
        return self._rows(before), state

    def gradients_behind(self, q, do, d_final_state):
        """Gradients: [B*parts,H,K,V] of the states behind the parts, and of the one before the row (None: unknown)."""
        if self.count == 1:
            return d_final_state, None
        sums = self._sums(self.to_start, q, do)
        gradient, behind = d_final_state, []
        for part in reversed(range(self.count)):
            behind.append(gradient)
            gradient = _times(self.across[:, part], gradient) + _times(self.enters[:, part], sums[:, part])
        return self._rows(behind[::-1]), gradient

    def _sums(self, weights, a, b):
        """[B,parts,H,K,V] sum over a part's tokens of weight a^T b; a, b [B,T,H,D]."""
        a, b = (x.reshape(self.batch, self.count, -1, *x.shape[2:]) for x in (a, b))
        weighted = (weights[..., None] * a).astype(a.dtype)
        return jnp.einsum("bpthk,bpthv->bphkv", weighted, b, preferred_element_type=jnp.float32)

    def _rows(self, states):
        return jnp.stack(states, axis=1).reshape(-1, *states[0].shape[1:])


def _times(weights, state):
    """[B or 1,H] times [B,H,K,V]."""
    return weights[..., None, None] * state
