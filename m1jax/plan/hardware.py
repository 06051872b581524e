"""Chips: memory, speed, links and price of one, and how many a name like v5p-1024 or h200x64 means."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Literal

from m1jax.errors import UserError

GIB = 2**30
Platform = Literal["gpu", "tpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What this package reaches on a chip, measured kernel by kernel (docs/gpu.md and the experiments it names)."""

    products: float
    """bfloat16 matrix products of a layer or the head, FLOP/s"""
    experts: float
    """the experts' kernels, forward and backward, FLOP/s"""
    attention: float
    """packed softmax attention forward and backward, heads of 128 channels, FLOP/s; smaller heads in proportion"""
    lightning: float
    """lightning attention forward and backward, seconds per token and head of 128 channels; smaller in proportion"""
    copy: float
    """of HBM by kernels that do little else, bytes/s, read and written"""
    exchange: float
    """collectives among the cards of a host in an update, bytes/s that a card sends"""
    launch: float
    """seconds from one small kernel to the next"""
    collective: float
    """seconds of a small exchange within a host that the next kernel waits for"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device. Memory and speeds are the makers' (docs.cloud.google.com/tpu, NVIDIA's data sheets)."""

    memory: float
    """bytes of HBM that a program may use"""
    flops: float
    """peak bfloat16 FLOP/s, dense"""
    bandwidth: float
    """HBM, bytes/s"""
    link: float
    """to the neighbours, bytes/s in one direction"""
    network: float | None = None
    """to devices of other hosts, bytes/s in one direction; None: the links reach everywhere (TPU)"""
    host: int
    """devices of one host (GPU: reached by `link`)"""
    price: float
    """US dollars per device and hour"""
    price_source: str
    rates: Rates | None = None
    """None: nobody has measured"""
    cores: int = 1
    """what the maker's names count instead of devices: v5p-8 is four chips"""
    topologies: dict[int, str] = dataclasses.field(default_factory=dict)
    """devices -> slice as libtpu names it"""

    @property
    def platform(self) -> Platform:
        return "tpu" if self.network is None else "gpu"


_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_CUBES |= {1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"}
_CLOUD = "Google Cloud, on demand, US, as known in 2025"
_RENTED = "RunPod, as listed by deploybase.ai, September 2025"
_REPORT = "the M1 report: 512 GPUs, three weeks, $534,700"

_HOPPER = Rates(
    products=700e12,
    experts=628e12,
    attention=417e12,
    lightning=1.0e-9,
    copy=3.65e12,
    exchange=180e9,
    launch=2.5e-6,
    collective=15e-6,
)

# What XLA for TPU itself calls available when it refuses a program; on GPUs 90 % of the card, as users set it.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(memory=15.75 * GIB, flops=197e12, bandwidth=819e9, link=200e9, host=8, price=1.20,
                price_source=_CLOUD, topologies=_FLAT),
    "v5p": Chip(memory=95.74 * GIB, flops=459e12, bandwidth=2765e9, link=600e9, host=4, price=4.20,
                price_source=_CLOUD, cores=2, topologies=_CUBES),
    "v6e": Chip(memory=31.25 * GIB, flops=918e12, bandwidth=1638e9, link=400e9, host=8, price=2.70,
                price_source=_CLOUD, topologies=_FLAT),
    "h100": Chip(memory=0.9 * 80e9, flops=989e12, bandwidth=3350e9, link=450e9, network=50e9, host=8, price=2.69,
                 price_source=_RENTED, rates=dataclasses.replace(_HOPPER, copy=2.65e12)),
    "h800": Chip(memory=0.9 * 80e9, flops=989e12, bandwidth=3350e9, link=200e9, network=50e9, host=8, price=2.07,
                 price_source=_REPORT),
    "h200": Chip(memory=0.9 * 141e9, flops=989e12, bandwidth=4800e9, link=450e9, network=50e9, host=8, price=3.59,
                 price_source=_RENTED, rates=_HOPPER),
    "b200": Chip(memory=0.9 * 180e9, flops=2250e12, bandwidth=7700e9, link=900e9, network=50e9, host=8, price=5.98,
                 price_source=_RENTED),
}  # fmt: skip


def parse_hardware(name: str) -> tuple[str, Chip, int]:
    """(kind, chip, devices) of "h200x64" (64 devices of any kind) or a cloud's "v6e-256", "v5p-1024" (512 chips).

    Raises:
        UserError: no such name, kind or count.
    """
    text = name.strip().lower()
    if text in CHIPS:
        raise UserError(f"hardware {name!r}: how many? For eight of them write {text}x8, for the fewest add --search")
    match = re.fullmatch(r"([a-z0-9]+)([-x])(\d+)", text)
    kind = match[1] if match else re.split(r"[^a-z0-9]|x\d*$", text)[0]
    if match is None or kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, 1)
        number = re.search(r"\d+$", text.removeprefix(kind))
        hint = f"; did you mean {near[0]}x{number[0] if number else 8}?" if near else ""
        raise UserError(
            f"hardware {name!r} is unknown{hint}; known: {', '.join(CHIPS)}, with a number of devices as in h200x64, "
            "v6e-256 or v5p-1024 (512 chips)"
        )
    chip = CHIPS[kind]
    if match[2] == "-" and not chip.topologies:
        raise UserError(f"hardware {name!r}: write {kind}x{match[3]}, the number of devices")
    count, rest = divmod(int(match[3]), chip.cores if match[2] == "-" else 1)
    if rest:
        raise UserError(f"hardware {name!r}: {match[3]} is no number of {kind}'s cores, {chip.cores} to a chip")
    if count < 1:
        raise UserError(f"hardware {name!r} is none at all; write {kind}x8 for eight of them")
    return kind, chip, count


def parse_tokens(text: str) -> int:
    """Tokens from "32768", "128k" (x 1,024) or "1m" (x 1,048,576).

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.lower().replace(",", "").replace("_", ""))
    count = float(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2]] if match else 0
    if not 1 <= count < 2**53 or count != int(count):
        raise UserError(f"context {text!r} should be a number of tokens such as 32768, 128k or 1m")
    return int(count)
