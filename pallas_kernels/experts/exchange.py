"""Experts spread over the devices of a mesh axis: their tokens go to them and come back.

Every device sorts its own assignments by expert and sends each to where its expert lies, next to those of the other
devices; nothing else travels. As `jax.lax.ragged_all_to_all` wants to know where everything goes before it goes, the
devices first tell each other how many assignments each expert has.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels._compat import vary_over, varying_axes
from pallas_kernels.experts.routing import Plan, plan, room

MOST = 8
"""devices among which XLA:GPU (JAX 0.11) copies by a kernel of its own; among more it asks NCCL for each part"""
PARTS = 1024
"""that all a device sends is cut into: that kernel has one thread block copy each. 134 MB between two H200 take 6.4 ms
in 16 parts, 0.6 in 1,024, as long as an all-gather."""
FEW = 1024
"""tokens of a device up to which they go to all devices: before an exchange there are some ten small steps (the number
is not measured)"""


def worthwhile(tokens: int, devices: int) -> bool:
    """Whether so many tokens of each device are exchanged by the program traced now, or sent to all devices."""
    able = target.target_platform() == "gpu" and devices <= MOST and jax.process_count() == 1
    return able and tokens > FEW and devices > 1


class _Parts(NamedTuple):
    """What a device sends, in equally many parts to each device of the axis: int32 [parts], those to one device after
    those to the one before, as `jax.lax.ragged_all_to_all` wants it."""

    first: jax.Array
    """row of the sender's array that a part begins with"""
    size: jax.Array
    """rows of it"""
    there: jax.Array
    """row of the receiver's array that it is put at"""
    received: jax.Array
    """rows of the parts that come, equally many from each device"""

    def send(self, rows: jax.Array, into: jax.Array, axis: str) -> jax.Array:
        """What all devices send of their `rows` [R,...], put `into` [Q,...]."""
        axes = varying_axes(rows, into, self.first) | {axis}
        into, rows = (vary_over(a, axes) for a in (into, rows))
        return jax.lax.ragged_all_to_all(rows, into, *self, axis_name=axis)


class Exchange(NamedTuple):
    """`routing.Plan` of a device's E experts, for the assignments [N,k] of each device of an axis."""

    axis: str
    mine: Plan
    """of this device's own assignments among all experts: what it sends"""
    go: _Parts
    come: _Parts
    filling: jax.Array  # [E block] rows that fill up this device's experts' blocks; `length` where there are fewer
    start: jax.Array  # [E]
    size: jax.Array  # [E]
    length: int
    """P: room for as many rows as could come"""

    def some_rows(self, x: jax.Array) -> jax.Array:
        """`rows`: what fills up a block must be a number, for the sums over rows."""
        return self.rows(x)

    def rows(self, x: jax.Array) -> jax.Array:
        """[N,D] of each device -> [P,D]: each row its token; zeros where it fills up a block, anything behind all."""
        into = jax.lax.empty((self.length, x.shape[1]), x.dtype).at[self.filling].set(0, mode="drop")
        return self.go.send(x.at[self.mine.token].get(mode="clip"), into, self.axis)

    def spread(self, values: jax.Array) -> jax.Array:
        """[N,k] of each device -> [P]: each row the value of its assignment; zero where there is none."""
        return self.go.send(self.mine.spread(values), jnp.zeros(self.length, values.dtype), self.axis)

    def gather(self, rows: jax.Array) -> jax.Array:
        """[P,...] -> [N,k,...] on each device: each assignment its row; zeros where its expert does not exist."""
        into = jax.lax.empty((self.mine.token.size, *rows.shape[1:]), rows.dtype)
        return self.mine.gather(self.come.send(rows, into, self.axis))


def exchange(routes: jax.Array, experts: int, block: int, axis: str) -> Exchange:
    """Sorts the `routes` [N,k] of all devices of the axis, each of which has so many `experts`; ids of experts that no
    device has count for nothing.

    Rows are in the order in which `routing.plan` would have them, had it all devices' routes one after the other.

    block: every expert's rows are filled up to a multiple of so many.
    """
    devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    mine = plan(routes, devices * experts)
    count = jax.lax.all_gather(mine.size, axis)  # [devices, all experts]
    size = -(-jnp.sum(count, axis=0) // block) * block
    start = _before(size.reshape(devices, experts), 1).reshape(-1)
    leaves = _before(count, 1)  # where a device has its rows for an expert
    arrives = start + _before(count, 0)  # and where the expert has them

    def own(values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(values, me * experts, experts, axis=-1)

    parts = max(1, PARTS // (devices * experts))
    sent, received = (_cut(c, parts) for c in (count[me], own(count)))
    go = _Parts(sent.at(leaves[me]), sent.size, sent.at(arrives[me]), received.size)
    come = _Parts(received.at(own(arrives)), received.size, received.at(own(leaves)), sent.size)
    length = room(devices * routes.size, experts, block)
    ends = own(start)[:, None] + jnp.sum(own(count), axis=0)[:, None] + jnp.arange(block)
    filling = jnp.where(ends < (own(start) + own(size))[:, None], ends, length).reshape(-1)
    return Exchange(axis, mine, go, come, filling, own(start), own(size), length)


class _Cuts(NamedTuple):
    """Counts [...] in equal parts, the last ones smaller or empty."""

    offset: jax.Array  # [..., parts]
    sizes: jax.Array  # [..., parts]

    @property
    def size(self) -> jax.Array:
        return self.sizes.reshape(-1)

    def at(self, first: jax.Array) -> jax.Array:
        """Where the parts are of what begins there."""
        return (first[..., None] + self.offset).reshape(-1)


def _cut(count: jax.Array, parts: int) -> _Cuts:
    step = (-(-count // parts))[..., None]
    offset = jnp.minimum(step * jnp.arange(parts, dtype=count.dtype), count[..., None])
    return _Cuts(offset, jnp.minimum(step, count[..., None] - offset))


def _before(count: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(count, axis=axis) - count
