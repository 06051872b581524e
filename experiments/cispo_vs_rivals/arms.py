"""The arms: an objective of `m1jax.rl.losses` each, and what its advantages are scaled by."""

import functools
from typing import Literal, NamedTuple

from m1jax.rl import conventions, losses
from m1jax.rl.losses import Objective


class Arm(NamedTuple):
    objective: Objective
    scale: Literal["group", "batch"] = "group"
    """what the advantages' standard deviation is taken over"""


ARMS: dict[str, Arm] = {
    "grpo": Arm(conventions.CONVENTIONS["grpo"].objective),
    "dapo": Arm(conventions.CONVENTIONS["dapo"].objective),
    "ppo-wide": Arm(functools.partial(losses.ppo, low=0.2, high=4.0)),
    "dppo": Arm(conventions.CONVENTIONS["dppo-tv"].objective),
    "dispo": Arm(functools.partial(losses.dispo, right=(0.5, 2.0), wrong=(0.0, 10.0))),
    "cispo": Arm(conventions.cispo(5.0)),
    "cispo-mask": Arm(functools.partial(losses.masked_cispo, max_weight=1.28, min_weight=0.8)),
    "scalerl": Arm(conventions.cispo(5.0), "batch"),
}
NAMES = tuple(ARMS)
