"""Whole conventions by name: objective, normaliser and advantages as a paper or a library has them together."""

import dataclasses
import functools
from typing import TypeGuard

from m1jax.errors import UserError
from m1jax.rl import aggregation, losses
from m1jax.rl.advantages import Advantages
from m1jax.rl.aggregation import Aggregation
from m1jax.rl.losses import Objective, Surrogate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """What a loss is made of."""

    objective: Objective
    aggregation: Aggregation
    advantages: Advantages

    def __str__(self) -> str:
        parts = [f"objective {_spelt(self.objective)}", f"normaliser {_spelt(self.aggregation)}"]
        return ", ".join([*parts, f"advantages {self.advantages}", *filter(None, [band(self.objective)])])


def cispo(max_weight: float = 5.0, min_weight: float = 0.0) -> Objective:
    """The objective with its bounds.

    Raises:
        UserError: bounds that do not hold 1 between them: they would scale every gradient.
    """
    if not max_weight >= 1:
        raise UserError(
            f"max_weight = {max_weight} would scale every gradient: it bounds the importance weight itself, which is 1 "
            f"where nothing has changed (1 + eps_high of the report; did you mean {1 + max_weight:g}?)"
        )
    if not 0 <= min_weight <= 1:
        raise UserError(f"min_weight = {min_weight} must lie between 0 (no bound) and 1")
    return functools.partial(losses.cispo, max_weight=max_weight, min_weight=min_weight)


def is_cispo(objective: Objective) -> TypeGuard[functools.partial[Surrogate]]:
    """Whether its bounds are those of `cispo`."""
    return isinstance(objective, functools.partial) and objective.func in (losses.cispo, losses.masked_cispo)


def band(objective: Objective) -> str:
    """The importance weights that are left as they are, in words; of objectives with bounds of CISPO's kind."""
    if not is_cispo(objective):
        return ""
    bounds = objective.keywords
    return f"importance weights within [{bounds['min_weight']:g}, {bounds['max_weight']:g}] stay as they are"


_GROUP = Advantages()
"""the report's: divisor G"""
_VERL = Advantages(ddof=1, epsilon=1e-6)
_TRL = Advantages(ddof=1, epsilon=1e-4)

CONVENTIONS: dict[str, Convention] = {
    # arXiv 2506.13585, section 3.1. eps_high is not published.
    "paper": Convention(objective=cispo(), aggregation=aggregation.prompt_mean, advantages=_GROUP),
    # Its unified form, eq. 6-7: without the tokens that leave the trust region.
    "paper-masked": Convention(
        objective=functools.partial(losses.masked_cispo, max_weight=5.0, min_weight=0.0),
        aggregation=aggregation.prompt_mean,
        advantages=_GROUP,
    ),
    # The same report, section 4.2, against late collapse: sample-level loss, token-level normalisation.
    "paper-mixed": Convention(objective=cispo(), aggregation=aggregation.mixed, advantages=_GROUP),
    # TRL 1.x, loss_type="cispo": epsilon_high is the cap itself.
    "trl": Convention(objective=cispo(), aggregation=aggregation.batch_token_mean, advantages=_TRL),
    # verl, loss_mode="cispo" with clip_ratio_low = 0.2, clip_ratio_high = 0.28: a band about 1.
    "verl": Convention(objective=cispo(1.28, 0.8), aggregation=aggregation.token_mean, advantages=_VERL),
    # arXiv 2510.13786: prompt mean; advantages about the group's mean, over the deviation of all in the batch.
    "scalerl": Convention(objective=cispo(), aggregation=aggregation.prompt_mean, advantages=Advantages(scale="batch")),
    # arXiv 1707.06347 with the dual clip of arXiv 1912.09729 and the baseline of a batch, as in verl.
    "ppo": Convention(
        objective=functools.partial(losses.ppo, low=0.2, high=0.2, dual=3.0),
        aggregation=aggregation.token_mean,
        advantages=Advantages(baseline="batch", scale="batch"),
    ),
    # arXiv 2402.03300.
    "grpo": Convention(
        objective=functools.partial(losses.ppo, low=0.2, high=0.2),
        aggregation=aggregation.sequence_mean,
        advantages=_GROUP,
    ),
    # arXiv 2503.14476.
    "dapo": Convention(
        objective=functools.partial(losses.ppo, low=0.2, high=0.28),
        aggregation=aggregation.token_mean,
        advantages=_GROUP,
    ),
    # arXiv 2503.20783.
    "dr-grpo": Convention(
        objective=functools.partial(losses.ppo, low=0.2, high=0.2),
        aggregation=aggregation.constant,
        advantages=Advantages(scale=None),
    ),
    # arXiv 2507.18071.
    "gspo": Convention(
        objective=functools.partial(losses.gspo, low=3e-4, high=4e-4),
        aggregation=aggregation.sequence_mean,
        advantages=_GROUP,
    ),
    "reinforce": Convention(
        objective=losses.reinforce,
        aggregation=aggregation.token_mean,
        advantages=Advantages(baseline="batch", scale="batch"),
    ),
    # arXiv 2602.04879; bounds as in verl's example of it.
    "dppo-tv": Convention(
        objective=functools.partial(losses.dppo, divergence="tv", low=0.15, high=0.15),
        aggregation=aggregation.token_mean,
        advantages=_GROUP,
    ),
    "dppo-kl": Convention(
        objective=functools.partial(losses.dppo, divergence="kl", low=0.05, high=0.05),
        aggregation=aggregation.token_mean,
        advantages=_GROUP,
    ),
}


def _spelt(function: object) -> str:
    """A function with the arguments it was given."""
    if isinstance(function, functools.partial):
        given = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in function.keywords.items()
        )
        return f"{function.func.__name__}({given})"
    return getattr(function, "__name__", str(function))
