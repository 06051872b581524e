"""How to train by reinforcement learning; the defaults are the report's where it gives a number."""

import dataclasses
from typing import Literal

from m1jax.errors import UserError, require_positive
from m1jax.model import Remat
from m1jax.rl.conventions import CONVENTIONS, Convention, cispo, is_cispo
from m1jax.rl.rewards import RewardRecipe
from m1jax.rl.rollout import GenerationRecipe
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import free
from m1jax.train.session import SessionRecipe

__all__ = ["EvaluationRecipe", "GenerationRecipe", "LossRecipe", "RLRecipe", "RewardRecipe", "UpdateRecipe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRecipe:
    """The loss, its normaliser and its advantages."""

    convention: Literal[
        "paper", "trl", "verl", "scalerl", "grpo", "dapo", "dr-grpo", "gspo", "reinforce", "dppo-tv", "dppo-kl"
    ] = "paper"
    """whose loss, normaliser and advantages: CISPO as in the report, as in TRL, verl or ScaleRL, or a rival of it
    (m1jax/rl/conventions.py)"""
    max_weight: float | None = None
    """of CISPO: upper bound of the importance weight pi / pi_old, the weight itself and not an offset from 1 (None: the
    convention's, 5 in paper, trl and scalerl)"""
    min_weight: float | None = None
    """of CISPO: lower bound of it (None: the convention's, 0 in paper, trl and scalerl: no bound)"""

    def __post_init__(self) -> None:
        _ = self.chosen

    @property
    def chosen(self) -> Convention:
        """The convention, with the bounds that were given.

        Raises:
            UserError: bounds that would scale every gradient, or of a loss that has none.
        """
        found = CONVENTIONS[self.convention]
        bounds = {"max_weight": self.max_weight, "min_weight": self.min_weight}
        given = {name: value for name, value in bounds.items() if value is not None}
        if not given:
            return found
        if not is_cispo(found.objective):
            raise UserError(f"{' and '.join(given)} bound the importance weights of CISPO; {self.convention} has none")
        return dataclasses.replace(found, objective=cispo(**found.objective.keywords | given))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRecipe:
    """How a generation batch is dealt out."""

    updates: int = 16
    """off-policy updates per generation batch"""
    row_length: int = 1280
    """tokens per row of an update's micro-batches; several responses share a row"""
    rows: int = free(8)
    """rows per micro-batch; the result does not depend on it, memory does"""
    remat: Remat = free("auto")
    """what the backward pass computes again: nothing (none), what is cheap (cheap), whole layers (layers: least memory,
    most time); auto is none on CPU and cheap elsewhere"""

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
