"""AdamW as the report runs it: betas (0.9, 0.95), eps 1e-15 (gradients range from 1e-18 to 1e-5), clipped by global
norm."""

import dataclasses
import math

import jax
import optax

from m1jax import parameters
from m1jax.errors import UserError, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up of the learning rate, a constant part and a linear decay."""

    learning_rate: float
    """peak learning rate"""
    warmup_steps: int = 0
    """updates until the peak is reached"""
    constant_fraction: float = 0.0
    """share of the updates after the warm-up that stay at the peak before the decay begins"""
    final_fraction: float = 1.0
    """learning rate of the last update, as a fraction of the peak (1: no decay)"""
    weight_decay: float = 0.0
    """decoupled weight decay of matrices (norm weights and embeddings are left alone)"""
    clip_norm: float = 1.0
    """gradients are scaled down to this global norm"""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "clip_norm", "eps")
        require_positive(
            self, "warmup_steps", "constant_fraction", "final_fraction", "weight_decay", "beta1", "beta2", zero=True
        )
        if self.learning_rate == math.inf:
            raise UserError("learning_rate = inf must be a number")
        if self.constant_fraction > 1:
            raise UserError(f"constant_fraction = {self.constant_fraction} is a share of the updates, at most one")
        if max(self.beta1, self.beta2) >= 1:
            raise UserError(f"beta1 = {self.beta1} and beta2 = {self.beta2} must be less than one")

    def schedule(self, total_steps: int) -> optax.Schedule:
        """Learning rate over update number 0 .. total_steps - 1."""
        steps = max(total_steps - self.warmup_steps, 1)
        constant = round(self.constant_fraction * steps)
        final = self.learning_rate * self.final_fraction
        decay = optax.linear_schedule(self.learning_rate, final, max(steps - constant, 1), constant)
        if self.warmup_steps == 0:
            return decay
        warmup = optax.linear_schedule(self.learning_rate / self.warmup_steps, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, decay], [self.warmup_steps])

    def build(self, total_steps: int) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.schedule(total_steps),
                b1=self.beta1,
                b2=self.beta2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=decayed,
            ),
        )


def decayed(params) -> object:
    """A pytree of bool like params: true where weight decay applies, as each parameter's declaration says."""
    return jax.tree_util.tree_map_with_path(lambda path, _: parameters.find(path)[0].decays, params)
