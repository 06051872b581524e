"""The normaliser of a policy-gradient loss: what a token counts.

A loss is a weighted sum over tokens, `sum_t weight_t * term_t`; all normalisation sits in the weights, which are
computed once per update over the whole batch. So a batch may be packed, split into micro-batches or spread over devices
in any way: the pieces add up to the same loss and gradient. All tokens of a response count alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Responses(NamedTuple):
    """The N responses of an update, and what they are part of."""

    tokens: Int[np.ndarray, " responses"]
    """trained tokens of each"""
    prompts: Int[np.ndarray, " responses"]
    """equal for responses to the same prompt"""
    batch_tokens: int
    """trained tokens of the generation batch, of all its updates"""
    updates: int
    """that the generation batch serves"""
    limit: int
    """tokens that a response may have"""


Weights = Float[np.ndarray, " responses"]
"""of each token of a response, float64"""
Aggregation = Callable[[Responses], Weights]


def prompt_mean(responses: Responses) -> Weights:
    """CISPO's (M1 report, eq. 4), also ScaleRL's: token mean over all responses to a prompt, then mean over prompts.
    A prompt without a trained token does not count as a prompt."""
    _, group = np.unique(responses.prompts, return_inverse=True)
    of_prompt = np.bincount(group, weights=responses.tokens)
    counted = max(np.count_nonzero(of_prompt), 1)
    return 1.0 / (np.maximum(of_prompt[group], 1.0) * counted)


def token_mean(responses: Responses) -> Weights:
    """Every token of the update counts alike (DAPO, verl)."""
    return np.full(len(responses.tokens), 1.0 / max(responses.tokens.sum(), 1))


def sequence_mean(responses: Responses) -> Weights:
    """Token mean within a response, then mean over responses (GRPO, GSPO). One without a trained token does not
    count."""
    counted = max(np.count_nonzero(responses.tokens), 1)
    return 1.0 / (np.maximum(responses.tokens, 1.0) * counted)


def constant(responses: Responses) -> Weights:
    """Every token counts the same in all updates: 1 / (responses * limit) (Dr. GRPO, arXiv 2503.20783)."""
    return np.full(len(responses.tokens), 1.0 / (len(responses.tokens) * responses.limit))


def batch_token_mean(responses: Responses) -> Weights:
    """Every token of the generation batch counts alike, times the updates it serves (TRL)."""
    return np.full(len(responses.tokens), responses.updates / max(responses.batch_tokens, 1))


def mixed(responses: Responses) -> Weights:
    """Halfway between `sequence_mean` and `token_mean`: the report's "sample-level loss" combined with "token-level
    normalization", against late collapse (section 4.2). It gives no formula; this is a reading."""
    return (sequence_mean(responses) + token_mean(responses)) / 2
