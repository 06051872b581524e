"""Rewards of responses turned into advantages (numpy: this runs on the host between generation and update)."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advantages:
    """(R - mean) / (std + epsilon).

    Where the rewards that a standard deviation is taken over are all equal, advantages are exactly zero.
    """

    baseline: Literal["group", "batch"] = "group"
    """what the mean is taken over: the responses to one prompt, or all of the generation batch"""
    scale: Literal["group", "batch"] | None = "group"
    """what the standard deviation of the advantages is taken over; None: no division"""
    ddof: int = 0
    """the divisor of the variance is the number of rewards minus this"""
    epsilon: float = 0.0

    def __call__(
        self, rewards: Float[np.ndarray, " responses"], prompts: Int[np.ndarray, " responses"]
    ) -> Float[np.ndarray, " responses"]:
        """Of a generation batch.

        Args:
            rewards: [N].
            prompts: [N], equal for responses to the same prompt.

        Returns:
            [N] float32.
        """
        rewards = rewards.astype(np.float64)
        everything, (_, group) = np.zeros(len(rewards), np.int64), np.unique(prompts, return_inverse=True)
        mean, spread, _ = _moments(rewards, group if self.baseline == "group" else everything)
        advantages = np.where(spread, rewards - mean, 0.0)
        if self.scale is not None:
            _, spread, (total, count) = _moments(advantages, group if self.scale == "group" else everything)
            std = np.sqrt(total / np.maximum(count - self.ddof, 1)) + self.epsilon
            advantages = np.where(spread, advantages / np.where(spread, std, 1.0), 0.0)
        return advantages.astype(np.float32)


def informative(rewards: Float[np.ndarray, " G"]) -> bool:
    """Whether they are not all equal. Dynamic sampling keeps only such groups (DAPO, arXiv 2503.14476, eq. 11)."""
    return len(rewards) > 0 and bool(rewards.max() > rewards.min())


def _moments(
    rewards: Float[np.ndarray, " N"], group: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " N"], Bool[np.ndarray, " N"], tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]]:
    """Of each reward's group: mean, whether its rewards differ, sum of squares about the mean and number."""
    count = np.bincount(group)
    mean = (np.bincount(group, weights=rewards) / np.maximum(count, 1))[group]
    squares = np.bincount(group, weights=(rewards - mean) ** 2)
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, group, rewards)
    np.maximum.at(high, group, rewards)
    # Not `std > 0`: the mean of equal floats may differ from them by a rounding error, and dividing by that would
    # amplify noise.
    return mean, (high > low)[group], (squares[group], count[group])
