"""AdamW as the report runs it: betas (0.9, 0.95), eps 1e-15 (gradients range from 1e-18 to 1e-5), clipped by global
norm."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
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

    def schedule(self, total_steps: int) -> "Schedule":
        """Learning rate over a run that is planned to make so many updates."""
        return Schedule(self, total_steps)

    def build(self, total_steps: int) -> optax.GradientTransformationExtraArgs:
        """AdamW; its `update` takes `planned` beside the usual arguments (see `Schedule`)."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            _descend(self.schedule(total_steps)),
        )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Up, constant, down.

    The warm-up counts updates that were made: it is there for AdamW's moments. The rest counts updates that were
    planned: where generation batches serve fewer updates than planned, the decay still ends with the run.
    """

    config: OptimizerConfig
    total_steps: int

    def __call__(self, made: jax.typing.ArrayLike, planned: jax.typing.ArrayLike | None = None) -> jax.Array:
        """Learning rate of an update.

        Args:
            made: updates made before it.
            planned: updates planned before it; None: as many as were made.
        """
        config = self.config
        warmup = config.warmup_steps
        rising = jnp.minimum(1.0, (1 + (warmup - 1) * made / warmup) / warmup) if warmup else 1.0
        if config.final_fraction == 1:  # one program, however many updates are planned
            return jnp.asarray(config.learning_rate * rising)
        steps = max(self.total_steps - warmup, 1)
        constant = round(config.constant_fraction * steps)
        passed = ((made if planned is None else planned) - warmup - constant) / max(steps - constant, 1)
        return config.learning_rate * rising * (1 - (1 - config.final_fraction) * jnp.clip(passed, 0.0, 1.0))


def updates_made(opt_state: optax.OptState) -> int:
    """How many updates an optimizer of `OptimizerConfig.build` has made; those left out do not count."""
    return int(optax.tree.get(opt_state, "made"))


class _Descent(NamedTuple):
    made: jax.Array
    learning_rate: jax.Array
    """of the last update"""


def _descend(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Times minus the learning rate, which stays in the state under its name."""

    def init(params: optax.Params) -> _Descent:
        return _Descent(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(
        updates: optax.Updates,
        state: _Descent,
        params: optax.Params | None = None,
        planned: jax.Array | None = None,
        **_: object,
    ) -> tuple[optax.Updates, _Descent]:
        rate = jnp.asarray(schedule(state.made, planned), jnp.float32)
        scaled = jax.tree.map(lambda g: -rate.astype(g.dtype) * g, updates)
        return scaled, _Descent(state.made + 1, rate)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def decayed(params) -> object:
    """A pytree of bool like params: true where weight decay applies, as each parameter's declaration says."""
    return jax.tree_util.tree_map_with_path(lambda path, _: parameters.find(path)[0].decays, params)
