"""The public op: arguments checked, implementation chosen.

    x_v = scale * h w_v        top = max_v x_v        sum_v exp(x_v - top)        sum_v exp(x_v - top) x_v

of a token's hidden state h over the rows w_v of the head: its log-probability of a word is x_v - top - log(mass), its
entropy top + log(mass) - weighted / mass.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ladder import Ladder
from pallas_kernels.vocabulary.statistics import Statistics

LADDER = Ladder(
    op="vocabulary_statistics",
    package="pallas_kernels.vocabulary",
    implementations=("reference", "xla", "hopper"),
    preferred={"gpu": ("hopper",)},
    portable="xla",
)


def vocabulary_statistics(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    *,
    scale: jax.Array | float = 1.0,
    keep_scores: bool = False,
    implementation: str = "auto",
) -> tuple[Statistics, jax.Array | None]:
    """Statistics of every token's scores, as accurate as float32 though computed on matrix units. No gradients.

    Args:
      hidden: [N,D] bfloat16.
      weight: [V,D] float32 or bfloat16, below 64 in size.
      targets: [N] int32, the word whose score is wanted; any number outside of 0 ... V - 1 for none.
      scale: of the scores, the reciprocal of a temperature.
      keep_scores: return the scores too, of which otherwise no more than a part is alive at once.
      implementation: "auto" (the best that can run here), "reference" (writes all scores out: for tests), "xla"
        (portable, in chunks of tokens; on GPUs its sums are rounded down, which costs about four bits), "hopper" (one
        kernel, which writes no score that is not to be kept).

    Returns:
      Statistics of float32 [N], and the scores [N,V] float32 if they were to be kept.

    Raises:
      ValueError: a shape that does not match, an unknown implementation, or a named one that cannot run here.
      TypeError: a dtype other than those above.
    """
    check(hidden, weight)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = {list(hidden.shape[:1])}: got {list(targets.shape)}")
    if targets.dtype != jnp.int32:
        raise TypeError(f"targets must be int32: got {targets.dtype}")
    name = LADDER.choose(implementation, hidden, weight)
    return LADDER.module(name).statistics(hidden, weight, targets, jnp.asarray(scale, jnp.float32), keep_scores)


def check(hidden: jax.Array, weight: jax.Array) -> None:
    """Raises what `vocabulary_statistics` says it raises about these."""
    if hidden.ndim != 2 or weight.ndim != 2 or 0 in hidden.shape + weight.shape:
        shapes = list(hidden.shape), list(weight.shape)
        raise ValueError("hidden must be [N,D] and weight [V,D], no axis empty: got {} and {}".format(*shapes))
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"weight must be [V,D], D = {hidden.shape[1]} as in hidden: got {list(weight.shape)}")
    if hidden.dtype != jnp.bfloat16:
        raise TypeError(f"hidden must be bfloat16: got {hidden.dtype}")
    if weight.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"weight must be float32 or bfloat16: got {weight.dtype}")
