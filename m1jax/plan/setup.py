"""What is planned: a model, a task, how much of it at once, and a mesh."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from m1jax.config import ModelConfig
from m1jax.errors import UserError, require_positive
from m1jax.sharding import AXES, ROWS, check_shardable

Task = Literal["sft", "rl", "generate"]
Remat = Literal["none", "cheap", "layers"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """One step of one task.

    Raises:
        UserError: a size below one, more tokens than the model has positions, or a mesh that cannot shard the model or
            the batch.
    """

    model: ModelConfig
    task: Task
    mesh: dict[str, int]
    """axis -> size, all five axes of `m1jax.sharding.AXES`"""
    context: int
    """tokens of a row; generation: room for prompt and answer"""
    rows: int
    """rows of a micro-batch, or sequences generated at once; over all devices"""
    micro_batches: int = 1
    """of an update, one after the other"""
    piece: int = 1
    """generation: tokens of each row per step; 1 is decoding, more is a piece of a prompt"""
    remat: Remat = "layers"
    """training: what the backward pass computes again, as in `MiniMaxM1.forward`"""
    sequences: int = 1
    """training: equally long ones packed into a row; attention sees none of the others"""

    def __post_init__(self) -> None:
        require_positive(self, "context", "rows", "micro_batches", "piece", "sequences")
        training = self.task != "generate"
        check_shardable(
            self.model, self.mesh, batch=self.rows if training else None, time=self.context if training else None
        )
        if self.context > self.model.max_position_embeddings:
            raise UserError(
                f"context = {self.context:,} is more than the model's {self.model.max_position_embeddings:,} positions"
            )
        if self.piece > self.context:
            raise UserError(f"piece = {self.piece} is more than the context = {self.context}")

    @property
    def devices(self) -> int:
        return math.prod(self.mesh[axis] for axis in AXES)

    @property
    def rows_are_cut(self) -> bool:
        """Whether the rows can be spread over data, fsdp and expert; else every device has all of them."""
        return self.rows % math.prod(self.mesh[axis] for axis in ROWS) == 0

    @property
    def rows_per_device(self) -> int:
        return self.rows // math.prod(self.mesh[axis] for axis in ROWS) if self.rows_are_cut else self.rows

    @property
    def time_per_device(self) -> int:
        """Tokens of a row that a device works on in attention."""
        length = self.piece if self.task == "generate" else self.context
        return length // self.mesh["sequence"] if length % self.mesh["sequence"] == 0 else length

    @property
    def residual_time(self) -> int:
        """Tokens of a row that a device keeps between the blocks, where tensor cuts time too if it can."""
        length = self.time_per_device
        return length // self.mesh["tensor"] if length % self.mesh["tensor"] == 0 else length

    @property
    def expert_group(self) -> int:
        """Devices that put their tokens together before the experts."""
        shared = self.mesh["expert"] if self.rows_are_cut else 1
        return shared * (self.mesh["tensor"] if self.residual_time < self.time_per_device else 1)
