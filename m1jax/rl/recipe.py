"""How to train by reinforcement learning; the defaults are the report's where it gives a number."""

import dataclasses
import functools
from typing import Literal

from m1jax.errors import UserError, require_finite, require_positive
from m1jax.model import Remat
from m1jax.rl import curriculum
from m1jax.rl.conventions import CONVENTIONS, Convention, cispo, is_cispo
from m1jax.rl.corrections import CORRECTIONS, Correction
from m1jax.rl.rewards import RewardRecipe
from m1jax.rl.rollout import GenerationRecipe
from m1jax.rl.window import WindowRecipe
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import free
from m1jax.train.session import SessionRecipe

__all__ = ["EvaluationRecipe", "GenerationRecipe", "LossRecipe", "RLRecipe", "RewardRecipe", "UpdateRecipe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRecipe:
    """The loss, its normaliser and its advantages."""

    convention: Literal[
        "paper",
        "paper-masked",
        "paper-mixed",
        "trl",
        "verl",
        "scalerl",
        "ppo",
        "grpo",
        "dapo",
        "dr-grpo",
        "gspo",
        "reinforce",
        "dppo-tv",
        "dppo-kl",
    ] = "paper"
    """whose loss, normaliser and advantages: CISPO as in the report, as in TRL, verl or ScaleRL, or a rival of it
    (m1jax/rl/conventions.py)"""
    max_weight: float | None = None
    """of CISPO: upper bound of the importance weight pi / pi_old, the weight itself and not an offset from 1 (None: the
    convention's, 5 in paper, trl and scalerl)"""
    min_weight: float | None = None
    """of CISPO: lower bound of it (None: the convention's, 0 in paper, trl and scalerl: no bound)"""

    old_policy: Literal["sampler", "trainer"] = "sampler"
    """whose log-probabilities the ratio is against: those recorded when the token was drawn, or the trainer's own with
    the same parameters (one more forward pass; what the two differ by is then `correction`'s affair)"""
    correction: Literal["none", "truncated", "truncated-sequence", "icepop", "geometric"] = "none"
    """of trainer against sampler, where old_policy is the trainer (m1jax/rl/corrections.py)"""
    kl_coefficient: float = 0.0
    """of the divergence from the policy that training began with, added to the loss (0: none, as in the report)"""

    def __post_init__(self) -> None:
        require_positive(self, "kl_coefficient", zero=True)
        require_finite(self, "kl_coefficient")
        if self.correction != "none" and self.old_policy == "sampler":
            raise UserError(
                f"correction = {self.correction} compares the trainer's log-probabilities with the sampler's: set "
                "old_policy = trainer"
            )
        _ = self.chosen

    @property
    def factors(self) -> Correction | None:
        """The correction."""
        return CORRECTIONS.get(self.correction)

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
        bounds = cispo(**found.objective.keywords | given).keywords
        return dataclasses.replace(found, objective=functools.partial(found.objective.func, **bounds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRecipe:
    """How a generation batch is dealt out."""

    updates: int = 16
    """off-policy updates per generation batch"""
    row_length: int = 1280
    """tokens per row of an update's micro-batches; several responses share a row"""
    rows: int = free(8)
    """rows per micro-batch; the result does not depend on it, memory does"""
    share_prompts: bool = False
    """compute the prompt of a group once for all its responses: pays where prompts are long beside them. A micro-batch
    then is whole groups, as many as have `rows` responses, at least one"""
    replay_routes: bool = False
    """router replay: training sends every token to the experts that sampling chose for it"""
    remat: Remat = free("auto")
    """what the backward pass computes again: nothing (none), what is cheap (cheap), whole layers (layers: least memory,
    most time); auto is none on CPU and cheap elsewhere"""

    def __post_init__(self) -> None:
        require_positive(self, "updates", "rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LateRecipe:
    """What is smaller late in training, against collapse (report, section 4.2, without numbers)."""

    late_from: int = 0
    """generation batches after which it begins (0: never)"""
    late_clip_norm: float | None = None
    """clip_norm from then on (None: as before)"""
    late_max_weight: float | None = None
    """max_weight of CISPO from then on (None: as before)"""

    def __post_init__(self) -> None:
        require_positive(self, "late_from", zero=True)
        if self.late_clip_norm is not None:
            require_positive(self, "late_clip_norm")
        if not self.late_from and (self.late_clip_norm is not None or self.late_max_weight is not None):
            raise UserError("late_from = 0: say after how many generation batches the smaller clip begins")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """Held-out problems."""

    evaluate_every: int = free(10)
    """generation batches between evaluations on held-out problems"""
    evaluate_rounds: int = free(4)
    """an evaluation asks so many times P held-out problems, G times each"""
    evaluate_temperature: float = free(1.0)
    evaluate_top_p: float = free(0.95)
    """as the report evaluates"""

    def __post_init__(self) -> None:
        require_positive(self, "evaluate_every", "evaluate_rounds", "evaluate_temperature", "evaluate_top_p")
        require_finite(self, "evaluate_temperature")
        if self.evaluate_top_p > 1:
            raise UserError(f"evaluate_top_p = {self.evaluate_top_p} must not exceed 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLRecipe(SessionRecipe):
    """The whole of it."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6))
    generation: GenerationRecipe = dataclasses.field(default_factory=GenerationRecipe)
    reward: RewardRecipe = dataclasses.field(default_factory=RewardRecipe)
    loss: LossRecipe = dataclasses.field(default_factory=LossRecipe)
    update: UpdateRecipe = dataclasses.field(default_factory=UpdateRecipe)
    window: WindowRecipe = dataclasses.field(default_factory=WindowRecipe)
    late: LateRecipe = dataclasses.field(default_factory=LateRecipe)
    evaluation: EvaluationRecipe = dataclasses.field(default_factory=EvaluationRecipe)
    curriculum: tuple[str, ...] = ()
    """weights that change: START:WEIGHT,WEIGHT,... says from which problem on which weights count, in the order of the
    files (of the parts of the task); 0:1,0 50000:3,1 (none: always those of the files)"""
    staleness: int = 0
    """generation beside training: batch b is written by the parameters of k batches before, exactly (0: one after the
    other)"""
    generator_mesh: str = free("")
    """the last devices generate, the others train: how those that generate share the work, for example data=2, or
    data=1 for one (none: all devices do both)"""
    iterations: int = free(100)
    """generation batches; a run may go on to more of them where its learning rates so far are those of the longer
    run"""
    checkpoint_every: int = free(40)
    """updates between checkpoints; they may fall into the middle of a generation batch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "iterations")
        require_positive(self, "staleness", zero=True)
        if self.generation.samples < 2:
            raise UserError(
                f"rl: samples = {self.generation.samples}; an advantage compares at least 2 responses to a problem"
            )
        _ = self.late_loss, [curriculum.stage(text) for text in self.curriculum]
        windows, longest = self.window.windows, self.generation.max_new_tokens
        if windows and windows[-1] != longest:
            raise UserError(f"windows end with {windows[-1]}: the last must be max_new_tokens = {longest}")
        shortest, buffer = min(windows, default=longest), self.reward.overlong_buffer
        if buffer > shortest:
            raise UserError(
                f"overlong_buffer = {buffer} would punish every response: it must not exceed "
                f"{'the first of windows' if windows else 'max_new_tokens'} = {shortest}"
            )
        if self.update.row_length < self.generation.longest:
            raise UserError(
                f"rl: row_length = {self.update.row_length} must hold a prompt and its response: max_prompt_tokens + "
                f"max_new_tokens = {self.generation.longest}"
            )

    @property
    def late_loss(self) -> LossRecipe:
        """The loss late in training."""
        if self.late.late_max_weight is None:
            return self.loss
        return dataclasses.replace(self.loss, max_weight=self.late.late_max_weight)

    @property
    def late_optimizer(self) -> OptimizerConfig:
        """The optimizer late in training; its state is that of before."""
        clip = self.late.late_clip_norm
        return self.optimizer if clip is None else dataclasses.replace(self.optimizer, clip_norm=clip)

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
