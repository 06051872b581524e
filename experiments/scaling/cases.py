"""What is measured: every case, what must not be lost first."""

from __future__ import annotations

import dataclasses
import functools
import math

from m1jax.config import LIGHTNING, SOFTMAX, ModelConfig
from m1jax.sharding import is_shardable, parse_mesh

HALF_M1 = ModelConfig(
    vocab_size=100_352,
    hidden_size=3072,
    intermediate_size=4608,
    layer_types=(LIGHTNING,) * 7 + (SOFTMAX,),
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rotary_dim=64,
    num_experts=16,
    experts_per_token=2,
)
"""M1 with every width halved and a tenth of its layers, 6.6 B parameters; 784 x 128 words, which four cards share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a card has to do."""

    preset: str = "m1-2b"
    large: str = "half-m1"
    rows: int = 8
    """of a card"""
    tokens: int = 4096
    """of a row"""
    long: int = 32_768
    """of a card's one row, where time is shared out"""
    longest: int = 1_048_576


REHEARSAL = Sizes(preset="m1-demo", large="m1-demo", rows=2, tokens=32, long=64, longest=256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One training on one mesh."""

    name: str
    rows: int
    """of an update, over all cards"""
    tokens: int
    """of a row"""
    mesh: str = ""
    """as `m1jax.sharding.make_mesh` reads it; empty: one card"""
    preset: str
    micro_batches: int = 1
    """one after the other: how one card trains on the rows of several"""
    sequences: int = 4
    """packed into a row"""
    remat: str = "auto"
    processes: int = 1
    """that share the cards, through `m1jax launch`"""
    flags: str = ""
    """for XLA, beside those that m1jax sets"""
    updates: int = 7
    """the first is not timed"""
    beside: str = ""
    """the one-card case whose work each card does here (weak scaling), or all cards together do (strong)"""
    same: str = ""
    """the one-card case that trains on the same rows: loss and gradient norm must agree"""

    @property
    def cards(self) -> int:
        return math.prod(parse_mesh(self.mesh).values())

    @property
    def config(self) -> ModelConfig:
        return HALF_M1 if self.preset == "half-m1" else ModelConfig.preset(self.preset)


_PIPELINED = "all_gather", "reduce_scatter", "all_reduce"  # on unless told otherwise
FLAGS = {
    "not pipelined": " ".join(f"--xla_gpu_enable_pipelined_{kind}=false" for kind in _PIPELINED),
    "no overlap": "--xla_gpu_enable_latency_hiding_scheduler=false",
    "two at once": "--xla_gpu_experimental_parallel_collective_overlap_limit=2",
    "early": "--xla_gpu_experimental_collective_start_as_early_as_possible=true",
    "symmetric": "--xla_gpu_experimental_enable_nccl_symmetric_buffers=true",
}
"""What XLA might do otherwise: a name, and flags"""


def cases(cards: int, sizes: Sizes) -> list[Case]:
    """Those for so many cards, in the order in which they are timed."""
    rows = sizes.rows
    wide = functools.partial(Case, preset=sizes.preset, tokens=sizes.tokens)
    long = functools.partial(Case, preset=sizes.preset, tokens=sizes.long)
    large = functools.partial(Case, preset=sizes.large, tokens=sizes.tokens, rows=cards * rows)
    counts = [2**i for i in range(1, cards.bit_length())]
    found = [wide(name="one", rows=rows, same="one"), long(name="one long", rows=1, same="one long")]
    for n in counts:
        same, same_long = f"one, {n} times", f"one long, {n} times"
        found.append(wide(name=same, rows=n * rows, micro_batches=n, updates=3))
        found.append(long(name=same_long, rows=n, micro_batches=n, updates=3))
        meshes = [f"{axis}={n}" for axis in ("data", "fsdp", "expert", "tensor")]
        found += [wide(name=mesh, mesh=mesh, rows=n * rows, beside="one", same=same) for mesh in meshes]
        mesh = f"sequence={n}"
        found.append(long(name=mesh, mesh=mesh, rows=n, beside="one long", same=same_long))
        mixed = [f"fsdp={n // 2},tensor=2", f"fsdp={n // 2},expert=2"] if n > 2 else []
        found += [wide(name=mesh, mesh=mesh, rows=n * rows, beside="one", same=same) for mesh in mixed]
    million = Case(
        name="a million tokens", preset=sizes.preset, tokens=sizes.longest, mesh=f"sequence={cards}", rows=1,
        sequences=1, remat="layers", updates=2,
    )  # fmt: skip
    meshes = [f"fsdp={cards}", f"fsdp={cards // 2},expert=2", f"fsdp={cards // 2},tensor=2"] if cards > 2 else []
    seven = [large(name=f"7 B, {mesh}", mesh=mesh) for mesh in meshes]
    found += [*seven[:1], million, *seven[1:]]
    found.append(
        wide(name="fsdp=2, 2 processes", mesh="fsdp=2", processes=2, rows=2 * rows, beside="one", same="one, 2 times")
    )
    for n in counts:
        meshes = [f"data={n}", f"fsdp={n}"]
        found += [wide(name=f"{m}, strong", mesh=m, rows=rows, beside="one", same="one") for m in meshes]
    most = functools.partial(wide, rows=cards * rows, beside="one", same=f"one, {cards} times")
    for name, flags in FLAGS.items():
        meshes = (f"fsdp={cards}", f"data={cards}", f"expert={cards}")
        found += [most(name=f"{mesh}, {name}", mesh=mesh, flags=flags) for mesh in meshes]
    sizes_of = ((case, parse_mesh(case.mesh)) for case in found)
    return [c for c, mesh in sizes_of if is_shardable(c.config, mesh, batch=c.rows, time=c.tokens)]
