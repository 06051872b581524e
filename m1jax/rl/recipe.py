"""How to train by reinforcement learning; the defaults are the report's where it gives a number."""

import dataclasses

from m1jax.errors import UserError, require_positive
from m1jax.rl.rewards import RewardRecipe
from m1jax.rl.rollout import GenerationRecipe
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import free
from m1jax.train.session import SessionRecipe

__all__ = ["EvaluationRecipe", "GenerationRecipe", "LossRecipe", "RLRecipe", "RewardRecipe", "UpdateRecipe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRecipe:
    """CISPO."""

    max_weight: float = 5.0
    """upper bound of the importance weight pi / pi_old, the weight itself and not an offset from 1; there is no lower
    bound"""

    def __post_init__(self) -> None:
        if not self.max_weight >= 1:
            raise UserError(
                f"max_weight = {self.max_weight} would scale every gradient: it bounds the importance weight itself, "
                f"which is 1 where nothing has changed (1 + eps_high of the report; did you mean "
                f"{1 + self.max_weight:g}?)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRecipe:
    """How a generation batch is dealt out."""

    updates: int = 16
    """off-policy updates per generation batch"""
    row_length: int = 1280
    """tokens per row of an update's micro-batches; several responses share a row"""
    rows: int = free(8)
    """rows per micro-batch; the result does not depend on it, memory does"""
    remat: bool = free(False)
    """recompute layers in the backward pass: less memory, more time"""

    def __post_init__(self) -> None:
        require_positive(self, "updates", "rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """Held-out problems."""

    evaluate_every: int = free(10)
    """generation batches between evaluations on held-out problems"""
    evaluate_rounds: int = free(4)
    """an evaluation asks so many times P held-out problems, G times each"""

    def __post_init__(self) -> None:
        require_positive(self, "evaluate_every", "evaluate_rounds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLRecipe(SessionRecipe):
    """The whole of it."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6))
    generation: GenerationRecipe = dataclasses.field(default_factory=GenerationRecipe)
    reward: RewardRecipe = dataclasses.field(default_factory=RewardRecipe)
    loss: LossRecipe = dataclasses.field(default_factory=LossRecipe)
    update: UpdateRecipe = dataclasses.field(default_factory=UpdateRecipe)
    evaluation: EvaluationRecipe = dataclasses.field(default_factory=EvaluationRecipe)
    iterations: int = free(100)
    """generation batches; a run may go on to more of them where its learning rates so far are those of the longer
    run"""
    checkpoint_every: int = free(40)
    """updates between checkpoints; they may fall into the middle of a generation batch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "iterations")
        if self.update.row_length < self.generation.longest:
            raise UserError(
                f"rl: row_length = {self.update.row_length} must hold a prompt and its response: max_prompt_tokens + "
                f"max_new_tokens = {self.generation.longest}"
            )

    @property
    def planned_updates(self) -> int:
        """Of the whole training."""
        return self.iterations * self.update.updates

    @property
    def micro_batches(self) -> int:
        """Room for an update whose responses all have the greatest length."""
        responses = -(-self.generation.prompts // self.update.updates) * self.generation.samples
        per_row = self.update.row_length // self.generation.longest
        return -(-responses // (per_row * self.update.rows))
