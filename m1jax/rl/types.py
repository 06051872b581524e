"""What passes between the phases of reinforcement learning: problems -> groups -> scored groups -> updates."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from m1jax.inference.types import Finish
from m1jax.rl.problem import Problem
from m1jax.train import packing
from m1jax.train.batch import Batch, column, optional_column

Ended = Literal["done", "cut", "overflow", "turns", "failed"]
"""Why an episode ended: the environment said so; the last turn was cut (see its `finish`); what the environment said
left no room for another turn; there were as many turns as there may be; the environment broke down (which nobody can
judge)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """One attempt at a problem: what stood in the context, token by token, and who wrote it."""

    prompt: Int[np.ndarray, " prompt"]
    """int32, at least one"""
    tokens: Int[np.ndarray, " time"]
    """int32, what followed, end tokens included"""
    written: Bool[np.ndarray, " time"]
    """by the model, hence trained on; the rest is the environment's"""
    logp: Float[np.ndarray, " time"]
    """float32, of the policy that sampled; zero where it did not write"""
    version: Int[np.ndarray, " time"]
    """int32, of the parameters that wrote the token; -1 where none did"""
    turns: tuple[str, ...]
    """the texts that the model wrote, without end tokens"""
    finish: Finish
    """why the last turn ended"""
    routes: UInt8[np.ndarray, "computed layers k"] | None = None
    """the experts of every token but the last, the prompt's too, where they were recorded"""
    ended: Ended = "done"
    reward: float | None = None
    """what the environment gave in all turns; None where it leaves that to a judge"""
    failure: str = ""
    """what broke down, of one that failed"""

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return int(self.written.sum())


@dataclasses.dataclass(frozen=True)
class Group:
    """A problem and the policy's attempts at it."""

    problem: Problem
    episodes: tuple[Episode, ...]
    number: int = 0
    """of the problem within its split"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """A group after it was judged; G episodes."""

    group: Group
    raw: Float[np.ndarray, " G"]
    """float32, what the judge gave; dynamic sampling looks at this"""
    rewards: Float[np.ndarray, " G"]
    """float32, raw plus what shapes it (penalties); advantages come from this"""
    parts: Mapping[str, Float[np.ndarray, " G"]]
    """name -> its part in the reward, float32"""
    correct: Bool[np.ndarray, " G"]

    @property
    def lengths(self) -> Int[np.ndarray, " G"]:
        """Tokens that the model wrote in each episode."""
        return np.array([episode.length for episode in self.group.episodes])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RLBatch(Batch):
    """Tokens that the policy wrote, with what became of them."""

    old_logp: Float[jax.Array, "*batch time"] = column(np.float32)
    """log-probability of the target under the policy that ratios are against: the sampler's when it was drawn, or the
    trainer's with the parameters that the updates began with"""
    advantage: Float[jax.Array, "*batch time"] = column(np.float32)
    sampler_logp: Float[jax.Array, "*batch time"] | None = optional_column(np.float32)
    """the same when it was drawn; None: old_logp is that"""
    reference_logp: Float[jax.Array, "*batch time"] | None = optional_column(np.float32)
    """the same under the policy that training began with"""
    routes: UInt8[jax.Array, "*batch time layers k"] | None = optional_column(np.uint8)
    """experts that sampling chose for each token"""
    prompts: Int[jax.Array, "*groups length"] | None = optional_column(np.int32, -1)
    """what stands before the rows, equally many of them side by side for each: prompts but for their last token, -1
    behind; None: rows are whole sequences"""
    prompt_routes: UInt8[jax.Array, "*groups length layers k"] | None = optional_column(np.uint8)


@dataclasses.dataclass(frozen=True)
class Updates:
    """What a generation batch serves: the micro-batches of all its updates.

    Fields [updates, micro-batches, rows, time]. No updates: there was nothing to learn.
    """

    batch: RLBatch

    def __len__(self) -> int:
        return len(self.batch.tokens)

    def remaining(self, made: int) -> Iterator[RLBatch]:
        """Those that come after the first `made`, fields [micro-batches, rows, time]."""
        for update in range(made, len(self)):
            yield self.batch.map(lambda x, update=update: x[update])

    def cut(self, rows: int, micro_batches: int) -> "Updates":
        """The same with so many rows in a micro-batch; at least so many micro-batches. Groups with their prompts stay
        as they are."""
        here = self.batch.tokens.shape[1:3]
        if here == (micro_batches, rows) or self.batch.prompts is not None:
            return self
        used = [update.map(lambda x: x.reshape(-1, *x.shape[2:])) for update in self.remaining(0)]
        used = [rows.map(lambda x, rows=rows: x[rows.mask.any(axis=1)]) for rows in used]
        count = max(micro_batches, *(-(-len(update.tokens) // rows) for update in used))
        return Updates(stacked([packing.micro_batches(update, rows, count) for update in used]))


def stacked(updates: list[RLBatch]) -> RLBatch:
    """Fields with one axis more in front."""
    return jax.tree.map(lambda *parts: np.stack(parts), *updates)
