"""What is wrong with a request, said before anything runs."""

from __future__ import annotations

import numpy as np

from m1jax.errors import UserError
from m1jax.inference.device import Runner
from m1jax.inference.stopping import END_IDS
from m1jax.inference.types import Request, Sampling


def check_request(request: Request, runner: Runner) -> None:
    """Refuses a request that this engine cannot serve.

    Raises:
        UserError: names the field, what it is and what it should be.
    """
    capacity, vocab_size = runner.capacity, runner.vocab_size
    check_sampling(request.sampling, vocab_size)
    tokens, new = np.asarray(request.tokens), request.sampling.max_new_tokens
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"request: tokens must be integers [prompt], not {tokens.dtype}{list(tokens.shape)}")
    if not len(tokens):
        raise UserError("request: the prompt is empty; a model needs at least one token to start from")
    _check_ids("prompt", tokens, vocab_size)
    if len(tokens) + new > capacity.max_length:
        raise UserError(
            f"request: a prompt of {len(tokens)} tokens and max_new_tokens = {new} exceed the engine's max_length = "
            f"{capacity.max_length} by {len(tokens) + new - capacity.max_length}; shorten the prompt or lower "
            "max_new_tokens"
        )
    if (need := capacity.pages_for(len(tokens) + new - 1)) > capacity.pages:
        raise UserError(
            f"request: {len(tokens)} tokens of prompt and {new} new ones need {need} pages of keys and values, the "
            f"engine has {capacity.pages}; give it more memory or lower max_new_tokens"
        )
    if request.samples < 1:
        raise UserError(f"request: samples = {request.samples} must be at least 1")
    if not 0 <= request.top <= runner.top:
        raise UserError(f"request: top = {request.top}, but this engine was made to tell from 0 to {runner.top} tokens")
    if request.constraint is not None and not runner.constrains:
        raise UserError("request: it has a constraint, and this engine was not made to take any")
    if request.record_routes and not runner.records_routes:
        raise UserError("request: record_routes asks for routes, which this engine was not made to record")
    wrong = [length for length in request.junctions if not 0 < length <= len(tokens)]
    if wrong:
        raise UserError(f"request: junction {wrong[0]} lies outside the prompt of {len(tokens)} tokens")


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Refuses options that are out of range; raises UserError naming the first."""
    repetition, budget = sampling.repetition_stop, sampling.thinking_budget
    valid = [
        ("temperature", sampling.temperature, 0 <= sampling.temperature < np.inf, "zero or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "at least 1"),
        ("number of end_ids", len(sampling.end_ids), len(sampling.end_ids) <= END_IDS, f"at most {END_IDS}"),
    ]
    if repetition is not None:
        probability = repetition.probability
        valid.append(("repetition_stop.probability", probability, 0 <= probability < 1, "from 0 to below 1"))
        valid.append(("repetition_stop.tokens", repetition.tokens, repetition.tokens >= 1, "at least 1"))
    if budget is not None:
        valid.append(("thinking_budget.tokens", budget.tokens, budget.tokens >= 1, "at least 1"))
        valid.append(("thinking_budget.close", budget.close, len(budget.close) > 0, "at least one id"))
    for name, value, right, expected in valid:
        if not right:  # so that NaN is refused
            raise UserError(f"sampling: {name} = {value} must be {expected}")
    _check_ids("end_ids", np.array(sampling.end_ids, np.int64), vocab_size)
    if budget is not None:
        _check_ids("thinking_budget", np.array([*budget.close, *budget.open], np.int64), vocab_size)


def _check_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise UserError(
            f"request: {name} holds token {wrong[0]}, but the vocabulary has {vocab_size}; "
            "is the tokenizer another model's?"
        )
