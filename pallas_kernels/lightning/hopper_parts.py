"""Long rows of few heads, cut into parts that a Hopper GPU walks through side by side.

One walk per head leaves most multiprocessors idle where there are few heads (8 per device under tensor parallelism).
So the tokens of a row are cut into parts of equal length; what the parts need of each other is one state per head,
summed by a kernel (`hopper_sums`) before they are walked through. It is the scheme of LASP-2 (arXiv 2502.07563) with a
decay, on one device.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._hopper import MULTIPROCESSORS
from pallas_kernels.lightning.hopper_sums import state_sums
from pallas_kernels.lightning.segments import is_real

SHORTEST = 1024
"""Tokens below which a part is not worth its state."""


class Parts:
    """How rows are cut, and the states between the parts."""

    def __init__(
        self, log_decay: jax.Array, segment_ids: jax.Array | None, batch: int, length: int, blocks_per_row: int
    ):
        """blocks_per_row: how many thread blocks walk through a row that is not cut."""
        self.batch, self.count, self.log_decay = batch, 1, log_decay
        while (
            2 * self.count * batch * blocks_per_row <= MULTIPROCESSORS
            and length % (2 * self.count * 64) == 0
            and length // (2 * self.count) >= SHORTEST
        ):
            self.count *= 2
        self.segment_ids = None if segment_ids is None else self.cut(segment_ids)
        if self.count == 1:
            return
        # [B or 1, parts, H]: whether a state enters a part, and what becomes of it across the part.
        if segment_ids is None:
            across = jnp.exp(length // self.count * log_decay)
            self.across = jnp.broadcast_to(across, (1, self.count, *log_decay.shape))
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
        self.across = jnp.where(crosses[..., None], jnp.exp(count[..., None] * log_decay), 0.0)
        self.enters = enters[..., None].astype(jnp.float32)

    def cut(self, x: jax.Array) -> jax.Array:
        """[B,T,...] -> [B*parts,T/parts,...]"""
        return x.reshape(x.shape[0] * self.count, -1, *x.shape[2:])

    def join(self, x: jax.Array) -> jax.Array:
        """[B*parts,T/parts,...] -> [B,T,...]"""
        return x.reshape(self.batch, -1, *x.shape[2:])

    def states_before(self, k, v, initial_state, **options):
        """The transposed state [B*parts,H,V,K] before each part; None for zeros."""
        state = None if initial_state is None else initial_state.mT
        if self.count == 1:
            return state
        sums = self._sums(k, v, reverse=False, **options)
        state = jnp.zeros_like(sums[:, 0]) if state is None else state
        before = []
        for part in range(self.count):
            before.append(_times(self.enters[:, part], state))
            if part < self.count - 1:
                state = _times(self.across[:, part], state) + sums[:, part]
        return self._rows(before)

    def gradients_behind(self, q, do, d_final_state, **options):
        """The transposed gradient [B*parts,H,V,K] of the state behind each part."""
        gradient = d_final_state.mT
        if self.count == 1:
            return gradient
        sums = self._sums(q, do, reverse=True, **options)
        behind = [gradient]
        for part in reversed(range(1, self.count)):
            entering = _times(self.enters[:, part], sums[:, part - 1])
            gradient = _times(self.across[:, part], gradient) + entering
            behind.append(gradient)
        return self._rows(behind[::-1])

    def left_behind(self, k, v, *, reverse, **options):
        """The transposed state [B,H,V,K] after whole rows that began with none; or, of queries and gradients of
        outputs, the gradient of the state before them."""
        arrays = (self.cut(k), self.cut(v), self.log_decay, self.segment_ids)
        sums = state_sums(*arrays, parts=None, reverse=reverse, **options)
        sums = sums.reshape(self.batch, self.count, *sums.shape[1:])
        if self.count == 1:
            return sums[:, 0]
        state = jnp.zeros_like(sums[:, 0])
        for part in reversed(range(self.count)) if reverse else range(self.count):
            entering = sums[:, part]
            if reverse and part > 0:
                entering = _times(self.enters[:, part], entering)
            state = _times(self.across[:, part], state) + entering
        return state

    def last(self, states):
        """[B*parts,...] of all parts -> [B,...] of every row's last one."""
        return states.reshape(self.batch, self.count, *states.shape[1:])[:, -1]

    def first(self, states):
        """[B*parts,...] of all parts -> [B,...] of every row's first one."""
        return states.reshape(self.batch, self.count, *states.shape[1:])[:, 0]

    def _sums(self, a, b, **options):
        """[B,parts-1,H,D,D] of all parts but the last of the walk, whose sum nobody waits for."""
        arrays = (self.cut(a), self.cut(b), self.log_decay, self.segment_ids)
        sums = state_sums(*arrays, parts=self.count, **options)
        return sums.reshape(self.batch, self.count - 1, *sums.shape[1:])

    def _rows(self, states):
        return jnp.stack(states, axis=1).reshape(-1, *states[0].shape[1:])


def _times(weights, state):
    """[B or 1,H] times [B,H,D,D]."""
    return weights[..., None, None] * state
