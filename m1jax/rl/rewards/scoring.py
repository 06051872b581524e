"""Groups -> scored groups: every episode judged once, by one of the processes; then penalties."""

import dataclasses
import logging
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from m1jax.errors import UserError, require_positive
from m1jax.processes import gathered
from m1jax.rl.rewards.judge import Judge, Unjudged
from m1jax.rl.types import Group, Scored

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """What a response earns."""

    format_reward: float = 0.1
    """for a wrong answer in the right form `<think>...</think>answer`; a right one gets 1"""
    overlong_buffer: int = 0
    """soft overlong penalty: width in tokens of the ramp below max_new_tokens (0: none)"""

    def __post_init__(self) -> None:
        require_positive(self, "format_reward", "overlong_buffer", zero=True)
        if self.format_reward >= 1:
            raise UserError(f"format_reward = {self.format_reward} must be less than 1, which a right answer gets")


def score(groups: Sequence[Group], judge: Judge, recipe: RewardRecipe, *, max_tokens: int) -> list[Scored]:
    """Judges groups of equal sizes; an episode that cannot be judged is left out of its group, with a warning.

    Args:
        groups: the same in every process; each judges its share of them.
        judge: what to judge by.
        recipe: penalties.
        max_tokens: the generation limit, where the overlong penalty is greatest.

    Raises:
        UserError: not one episode could be judged.
    """
    verdicts = np.zeros((4, len(groups), len(groups[0].episodes)), np.float32)
    failures: list[str] = []
    for i in range(jax.process_index(), len(groups), jax.process_count()):
        for j, episode in enumerate(groups[i].episodes):
            if episode.ended == "failed":
                failures.append(episode.failure)
                continue
            try:
                verdicts[:, i, j] = (*judge(groups[i].problem, episode), True)
            except Unjudged as error:
                failures.append(str(error))
    answer, form, correct, judged = gathered(verdicts).sum(axis=0)
    if failures:
        log.warning("%d of %d responses are left out: %s", len(failures), judged.size, failures[0])
    if not judged.any():
        raise UserError(failures[0] if failures else "no response could be judged; see the other processes")
    scored = []
    for i, group in enumerate(groups):
        kept = np.flatnonzero(judged[i])
        episodes = tuple(group.episodes[j] for j in kept)
        lengths = np.array([episode.length for episode in episodes], np.int64)
        parts = {"answer": answer[i, kept], "format": form[i, kept]}
        raw = parts["answer"] + parts["format"]
        if recipe.overlong_buffer:
            parts["overlong"] = overlong_penalty(lengths, max_tokens=max_tokens, buffer_tokens=recipe.overlong_buffer)
        rewards = raw + parts.get("overlong", np.float32(0))
        scored.append(
            Scored(
                group=dataclasses.replace(group, episodes=episodes),
                raw=raw,
                rewards=rewards,
                parts=parts,
                correct=correct[i, kept] > 0,
            )
        )
    return scored


def overlong_penalty(
    lengths: Int[np.ndarray, "*shape"], *, max_tokens: int, buffer_tokens: int
) -> Float[np.ndarray, "*shape"]:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), counted in tokens.

    Args:
        lengths: any shape, number of generated tokens (end-of-sequence included).
        max_tokens: the generation limit.
        buffer_tokens: width of the ramp below the limit; 0 switches the penalty off.

    Returns:
        float32 of the same shape: 0 up to max_tokens - buffer_tokens, then falling linearly to -1 at max_tokens.
    """
    lengths = np.asarray(lengths)
    if buffer_tokens == 0:
        return np.zeros(lengths.shape, np.float32)
    return np.clip((max_tokens - buffer_tokens - lengths) / buffer_tokens, -1.0, 0.0).astype(np.float32)
