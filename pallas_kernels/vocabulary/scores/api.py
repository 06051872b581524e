"""The public op: arguments checked, implementation chosen."""

import jax

from pallas_kernels.ladder import Ladder
from pallas_kernels.vocabulary.api import check

LADDER = Ladder(
    op="vocabulary_scores",
    package="pallas_kernels.vocabulary.scores",
    implementations=("xla", "hopper"),
    preferred={"gpu": ("hopper",)},
    portable="xla",
)


def vocabulary_scores(hidden: jax.Array, weight: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """[N,V] float32: hidden times the weight's rows, as accurate as float32. No gradients.

    Args:
      hidden: [N,D] bfloat16.
      weight: [V,D] float32 or bfloat16, below 64 in size.
      implementation: "auto" (the best that can run here), "xla" (portable) or "hopper" (one kernel that reads float32
        weights once).

    Raises:
      ValueError: a shape that does not match, an unknown implementation, or a named one that cannot run here.
      TypeError: a dtype other than those above.
    """
    check(hidden, weight)
    name = LADDER.choose(implementation, hidden, weight)
    return LADDER.module(name).scores(hidden, weight)
