"""The normaliser of a policy-gradient loss: what a token counts.

A loss is a weighted sum over tokens, `sum_t weight_t * term_t`; all normalisation sits in the weights, which are
computed once per update over the whole batch. So a batch may be packed, split into micro-batches or spread over devices
in any way: the pieces add up to the same loss and gradient. All tokens of a response count alike.
"""

import numpy as np
from jaxtyping import Float, Int


def prompt_mean(
    tokens: Int[np.ndarray, " responses"], prompts: Int[np.ndarray, " responses"]
) -> Float[np.ndarray, " responses"]:
    """CISPO's (M1 report, eq. 4): token mean over all responses to a prompt, then mean over prompts.

    Args:
        tokens: [N] trained tokens of each response of an update.
        prompts: [N] equal for responses to the same prompt.

    Returns:
        [N] float64, the weight of each token of a response; over all tokens they sum to 1. A prompt without a trained
        token does not count as a prompt.
    """
    _, group = np.unique(prompts, return_inverse=True)
    of_prompt = np.bincount(group, weights=tokens)
    counted = max(np.count_nonzero(of_prompt), 1)
    return 1.0 / (np.maximum(of_prompt[group], 1.0) * counted)
