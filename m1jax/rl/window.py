"""How long responses may be, in stages: the window grows when the policy has grown into it (report, section 4.2)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from m1jax.errors import UserError, require_positive
from m1jax.rl.types import Scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowRecipe:
    """When the window grows. The report says "when perplexity converges and the 99th percentile of lengths nears the
    window", without numbers; the numbers here are a reading."""

    windows: tuple[int, ...] = ()
    """tokens a response may have, stage by stage; the last is max_new_tokens (none: that from the beginning)"""
    window_batches: int = 3
    """generation batches in a row over which perplexity must have stood still"""
    window_tolerance: float = 0.02
    """largest spread of their perplexities, relative to the smallest, that counts as standing still"""
    window_nearness: float = 0.9
    """share of the window that the 99th percentile of lengths must reach"""

    def __post_init__(self) -> None:
        require_positive(self, "window_batches", "window_tolerance", "window_nearness")
        if self.window_nearness > 1:
            raise UserError(f"window_nearness = {self.window_nearness} is never reached: it must not exceed 1")
        if list(self.windows) != sorted(set(self.windows)) or any(window < 1 for window in self.windows):
            raise UserError(f"windows = {self.windows} must grow from stage to stage")


@dataclasses.dataclass
class Window:
    """Which stage it is, and what was seen in it."""

    stage: int = 0
    perplexities: list[float] = dataclasses.field(default_factory=list)
    """of the generation batches of this stage"""

    def tokens(self, recipe: WindowRecipe, longest: int) -> int:
        """That a response may have now; `longest`: max_new_tokens."""
        return recipe.windows[self.stage] if recipe.windows else longest

    def see(self, scored: Sequence[Scored], recipe: WindowRecipe) -> bool:
        """Takes a generation batch into account, and says whether the next stage begins."""
        if self.stage + 1 >= len(recipe.windows) or not scored:
            return False
        lengths = np.concatenate([group.lengths for group in scored])
        self.perplexities.append(perplexity(scored))
        recent = self.perplexities[-recipe.window_batches :]
        still = len(recent) == recipe.window_batches and max(recent) <= min(recent) * (1 + recipe.window_tolerance)
        if not still or np.percentile(lengths, 99) < recipe.window_nearness * recipe.windows[self.stage]:
            return False
        self.stage, self.perplexities = self.stage + 1, []
        return True


def perplexity(scored: Sequence[Scored]) -> float:
    """Of what the policy wrote, by its own probabilities."""
    episodes = [episode for group in scored for episode in group.group.episodes]
    total = sum(float(episode.logp.sum(dtype=np.float64)) for episode in episodes)
    return float(np.exp(-total / max(sum(episode.length for episode in episodes), 1)))
