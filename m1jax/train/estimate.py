"""How long an update will take on a CPU, before it is waited for."""

import logging
import math
import os

import jax

from m1jax.config import ModelConfig
from m1jax.flops import training_flops

log = logging.getLogger(__name__)

CORE = 20e9
"""float32 operations per second of one core, as trainings of small models reach on two-year-old servers; a guess"""
REST = 5e-6
"""seconds of one core for a token in a layer, beside the operations counted: norms, routing, rotations. With it the
estimate is within a tenth of what updates of models of 16, 48 and 64 channels took on one core of a server"""
PATIENCE = 60.0
"""seconds that an update may take without a word"""


def warn_if_slow(config: ModelConfig, tokens: int, length: int, updates: int, option: str) -> None:
    """Warns, with numbers, where an update would take minutes on this CPU; says nothing on other devices.

    Args:
        config: the model's.
        tokens: of an update.
        length: of a sequence, at most.
        updates: of the whole training.
        option: what to make smaller, with its value; tokens are in proportion to it.
    """
    if jax.default_backend() != "cpu":
        return
    operations = training_flops(config, tokens, tokens * (length + 1) / 2)
    seconds = (operations / CORE + REST * tokens * config.num_layers) / cores()
    if seconds <= PATIENCE:
        return
    name, value = option.split()
    smaller = 2 ** int(math.log2(max(int(value) * PATIENCE / seconds / 4, 1)))
    log.warning(
        "an update of %s tokens takes %s operations: on %d CPU cores some %s, the whole training %s. --%s %d would "
        "take some %s an update",
        *(f"{tokens:,}", f"{operations:.1e}", cores(), spelt(seconds), spelt(seconds * updates)),
        *(name, smaller, spelt(seconds * smaller / int(value))),
    )


def cores() -> int:
    """Of this machine's processor, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spelt(seconds: float) -> str:
    """A duration in words, to about one digit."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
