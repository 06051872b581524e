"""Rewards of groups of responses turned into advantages (numpy: this runs on the host between generation and
update)."""

import numpy as np


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """(R - mean) / std over the responses to one prompt (M1 report, section 3.1; std with divisor G).

    Args:
        rewards: [P, G], one row per prompt.

    Returns:
        [P, G] float32. A group whose rewards are all equal gets exactly zero.
    """
    rewards = np.asarray(rewards, np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    std = np.sqrt((centred**2).mean(axis=1, keepdims=True))
    # Not `std == 0`: the mean of equal floats may differ from them by a rounding error, and dividing by that would
    # amplify noise.
    spread = informative(rewards)[:, None]
    return np.where(spread, centred / np.where(spread, std, 1.0), 0.0).astype(np.float32)


def informative(rewards: np.ndarray) -> np.ndarray:
    """[P] bool: groups whose rewards are not all equal. Dynamic sampling keeps only these (DAPO, arXiv 2503.14476, eq.
    11)."""
    rewards = np.asarray(rewards)
    return rewards.max(axis=1) > rewards.min(axis=1)


def overlong_penalty(lengths: np.ndarray, *, max_tokens: int, buffer_tokens: int) -> np.ndarray:
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
