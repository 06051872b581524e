"""Time and price of one step, from below: operations, HBM traffic and links at their peak, whichever is slowest."""

from __future__ import annotations

import dataclasses
import math

from m1jax.config import LIGHTNING
from m1jax.flops import forward_flops
from m1jax.plan.hardware import Chip
from m1jax.plan.memory import attention_bytes, elements, expert_bytes, gathered_tokens, head_bytes
from m1jax.plan.setup import Setup
from m1jax.sharding import AXES, COLUMNS, CUT, vocabulary_is_cut


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a device sends (and receives about as much of) in one step, for one purpose."""

    purpose: str
    axes: tuple[str, ...]
    bytes: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """Bounds of one step on one chip."""

    flops_per_token: float
    """of the model, all devices together; nothing recomputed"""
    compute: float
    """seconds for all operations at peak, recomputation included"""
    hbm: float
    """seconds to read and write what must be, at full bandwidth"""
    links: float
    """seconds for all exchanges, none hidden behind another"""
    tokens: int
    """of one step, over all devices"""
    mfu: float
    """upper bound: the model's operations over what the devices could do in the slowest of the three times"""
    million_tokens_seconds: float
    million_tokens_dollars: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.links)

    @property
    def bound_by(self) -> str:
        times = {"operations": self.compute, "HBM": self.hbm, "links": self.links}
        return max(times, key=lambda name: times[name])


def exchanges(setup: Setup) -> list[Exchange]:
    """All that `m1jax.model.parallel` and `m1jax.sharding` make devices exchange in one step, largest first.

    Small ones are left out: routes, lightning states, norms.
    """
    m, mesh = setup.model, setup.mesh
    layers, tokens = m.num_layers, setup.rows_per_device * setup.time_per_device
    hidden = 2 * m.hidden_size
    train = setup.task != "generate"
    weights = layers * (2 + (setup.remat != "none") if train else 1)  # gathered for each pass; gradients back
    steps = setup.micro_batches if train else 1
    words_are_cut = vocabulary_is_cut(m.vocab_size, mesh)
    group = tuple(a for a in ("expert", "tensor") if mesh[a] > 1)
    inner = 2 * m.num_heads * m.head_dim / mesh["tensor"]
    softmax = m.num_layers - m.layer_types.count(LIGHTNING)
    # (purpose, axes, bytes of one, how often): gathers forward and for each recomputation, sums back.
    counted = [
        ("tokens to the experts and back", group, gathered_tokens(setup) * hidden, layers * (5 if train else 2)),
        ("time gathered for attention", ("tensor",), tokens * hidden, layers * (6 if train else 2)),
        ("expert weights", ("fsdp",), expert_bytes(setup), weights),
        ("other weights", CUT, attention_bytes(setup), weights),
        ("embedding and head", CUT if words_are_cut else COLUMNS, head_bytes(setup), 4 if train else 0.5),
        ("heads for time", ("sequence",), tokens * inner, softmax * (8 if train else 2)),
        ("gradients", ("data",), 4 * sum(elements(setup)), 2 if train else 0),
    ]
    found = [
        Exchange(purpose, axes, steps * times * size)
        for purpose, axes, size, times in counted
        if math.prod(mesh[a] for a in axes) > 1 and times
    ]
    return sorted(found, key=lambda e: -e.bytes)


def speed(setup: Setup, chip: Chip, price: float) -> Speed:
    """`price`: dollars per device and hour."""
    m, length = setup.model, setup.piece if setup.task == "generate" else setup.context
    count = sum(elements(setup))
    tokens = setup.rows * length * (setup.micro_batches if setup.task != "generate" else 1)
    if setup.task == "generate":
        start = setup.context - setup.piece  # the last piece, which sees the most
        model = executed = setup.rows * forward_flops(m, setup.piece, start=start)
        softmax = m.num_layers - m.layer_types.count(LIGHTNING)
        kv = 4 * setup.rows_per_device * setup.context * m.num_kv_heads / setup.mesh["tensor"] * m.head_dim * softmax
        states = 4 * setup.rows_per_device * m.num_heads / setup.mesh["tensor"] * m.head_dim**2
        # Few tokens need few of the experts: each choice reads at most one more.
        used = min(1.0, gathered_tokens(setup) * m.experts_per_token / m.num_experts * setup.mesh["expert"])
        moe = m.num_layers * expert_bytes(setup) / setup.mesh["fsdp"]
        traffic = 2 * count - moe * (1 - used) + kv + 2 * states * (m.num_layers - softmax)
    else:
        again = setup.remat == "layers"
        sequences = setup.rows * setup.micro_batches * setup.sequences
        forward = forward_flops(m, length // setup.sequences) * sequences
        model, executed = 3 * forward, (3 + again) * forward
        # Weights once per pass, optimizer and parameters read and written, the residual stream there and back.
        saved = 4 * m.num_layers * setup.rows_per_device * setup.residual_time * m.hidden_size
        weights = m.num_layers * (expert_bytes(setup) + attention_bytes(setup))
        traffic = setup.micro_batches * ((2 + again) * weights + saved + 12 * count) + 24 * count
    compute = executed / setup.devices / chip.flops
    links = sum(e.bytes / _rate(setup, chip, e.axes) for e in exchanges(setup))
    slowest = max(compute, traffic / chip.bandwidth, links)
    seconds = slowest / tokens * 1e6
    return Speed(
        flops_per_token=model / tokens,
        compute=compute,
        hbm=traffic / chip.bandwidth,
        links=links,
        tokens=tokens,
        mfu=model / (slowest * setup.devices * chip.flops),
        million_tokens_seconds=seconds,
        million_tokens_dollars=seconds / 3600 * setup.devices * price,
    )


def _rate(setup: Setup, chip: Chip, axes: tuple[str, ...]) -> float:
    """Bytes/s of an exchange: over the network where its devices are more than a host's, the last axes being next to
    each other."""
    if chip.network is None:
        return chip.link
    first = min(AXES.index(axis) for axis in axes if setup.mesh[axis] > 1)
    span = math.prod(setup.mesh[axis] for axis in AXES[first:])
    return chip.link if span <= chip.host else chip.network
