"""Rewards of a group of responses turned into advantages (numpy: this runs on the host between generation and
update)."""

import numpy as np
from jaxtyping import Float


def group_advantages(rewards: Float[np.ndarray, " G"]) -> Float[np.ndarray, " G"]:
    """(R - mean) / std over the responses to one prompt (M1 report, section 3.1; std with divisor G).

    Returns:
        [G] float32. Rewards that are all equal get exactly zero.
    """
    # Not `std == 0`: the mean of equal floats may differ from them by a rounding error, and dividing by that would
    # amplify noise.
    if not informative(rewards):
        return np.zeros(len(rewards), np.float32)
    centred = rewards.astype(np.float64) - rewards.astype(np.float64).mean()
    return (centred / np.sqrt((centred**2).mean())).astype(np.float32)


def informative(rewards: Float[np.ndarray, " G"]) -> bool:
    """Whether they are not all equal. Dynamic sampling keeps only such groups (DAPO, arXiv 2503.14476, eq. 11)."""
    return len(rewards) > 0 and bool(rewards.max() > rewards.min())
