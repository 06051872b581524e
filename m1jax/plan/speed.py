"""Time and price of one step, from below: operations, HBM traffic and links at their peak, whichever is slowest."""

from __future__ import annotations

import dataclasses
import math

from m1jax.config import LIGHTNING
from m1jax.flops import forward_flops
from m1jax.plan.hardware import Chip, Platform
from m1jax.plan.memory import attention_bytes, elements, expert_bytes, gathered_tokens, head_bytes, words
from m1jax.plan.setup import Setup
from m1jax.sharding import AXES, COLUMNS, CUT, vocabulary_is_cut
from pallas_kernels.experts.exchange import FEW, MOST


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a device sends (and receives about as much of) in one step, for one purpose."""

    purpose: str
    axes: tuple[str, ...]
    bytes: float
    waited: float
    """of these, what work waits for: what a forward pass needs of its tokens, there being nothing else to do"""


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


def sends_to_experts_alone(setup: Setup, platform: Platform) -> bool:
    """Whether a token goes to its experts' devices alone (`pallas_kernels.experts.exchange`), not to all of them."""
    alone = platform == "gpu" and setup.devices <= MOST and setup.rows_are_cut and setup.mesh["expert"] > 1
    return alone and setup.rows_per_device * setup.residual_time > FEW


def expert_tokens(setup: Setup, platform: Platform) -> float:
    """Tokens with which a device does what is done token by token in the experts, the router being balanced."""
    return gathered_tokens(setup) / (setup.mesh["expert"] if sends_to_experts_alone(setup, platform) else 1)


def exchanges(setup: Setup, platform: Platform) -> list[Exchange]:
    """All that `m1jax.model.parallel` and `m1jax.sharding` make devices exchange in one step, largest first.

    Small ones are left out: routes, lightning states, norms.
    """
    m, mesh = setup.model, setup.mesh
    layers, tokens = m.num_layers, setup.rows_per_device * setup.time_per_device
    hidden = 2 * m.hidden_size
    train = setup.task != "generate"
    recomputed = train and setup.remat != "none"
    layers_again = train and setup.remat == "layers"  # while they are recomputed, there is nothing else to do either
    weights = layers * (2 + recomputed) if train else 0  # gathered for each pass; gradients back
    steps = setup.micro_batches if train else 1
    words_are_cut = vocabulary_is_cut(m.vocab_size, mesh)
    alone = sends_to_experts_alone(setup, platform)
    group = tuple(a for a in ("expert", "tensor") if mesh[a] > 1 and not (alone and a == "expert"))
    inner = 2 * m.num_heads * m.head_dim / mesh["tensor"]
    softmax = m.num_layers - m.layer_types.count(LIGHTNING)
    # Gathered and summed in the forward pass, gathered again for what is recomputed (with whole layers, attention's
    # output summed again too), and in the backward pass gradients likewise. The head and the embedding: their tokens'
    # gather and sum, and gradients. Heads: queries, keys, values one way, the result the other.
    experts = (4 + recomputed, 2 + layers_again) if train else (2, 2)
    # To their experts alone: there and back, and in the backward pass their gradients likewise, and they once more.
    sent = (5 + layers_again, 2 + layers_again) if train else (2, 2)
    attention = (4 + recomputed + layers_again, 2 + 2 * layers_again) if train else (2, 2)
    ends = 4 if train else 2
    heads = 2 * (1 + m.num_kv_heads / m.num_heads)
    together = expert_tokens(setup, platform)
    chosen = together * m.experts_per_token if alone else 0.0
    # (purpose, axes, bytes of one, how often, how often waited for).
    counted = [
        ("tokens to all experts and back", group, together * hidden, *(layers * n for n in experts)),
        ("tokens to their experts and back", ("expert",), chosen * hidden, *(layers * n for n in sent)),
        ("tokens gathered for attention", ("tensor",), tokens * hidden, *(layers * n + ends for n in attention)),
        ("expert weights", ("fsdp",), expert_bytes(setup), weights, 0),
        ("other weights", CUT, attention_bytes(setup), weights, 0),
        # A float32 head; embedding and gradients in 16 bits.
        ("embedding and head", CUT if words_are_cut else COLUMNS, head_bytes(setup), 2.5 if train else 0, 0),
        ("heads for time", ("sequence",), tokens * inner, *[softmax * heads * (2 if train else 1)] * 2),
        ("gradients", ("data", "sequence"), 2 * sum(elements(setup)), 2 if train else 0, 0),
        ("scores of words", ("tensor",), 4 * setup.rows_per_device * words(setup), 0 if train else 1, 0),
    ]
    found = [
        Exchange(purpose, axes, steps * times * size, steps * (waited if train else times) * size)
        for purpose, axes, size, times, waited in counted
        if math.prod(mesh[a] for a in axes) > 1 and times * size
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
        moe = m.num_layers * expert_bytes(setup)
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
    links = sum(e.bytes / _rate(setup, chip, e.axes) for e in exchanges(setup, chip.platform))
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
