"""Continuations of a batch of prompts: an engine of the right size, for one call."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from flax import nnx

from m1jax.chat import Tokenizer
from m1jax.errors import UserError, require_seed
from m1jax.inference.engine import Engine
from m1jax.inference.memory import batch_capacity
from m1jax.inference.runner import ModelRunner
from m1jax.inference.stopping import END_IDS
from m1jax.inference.types import Request, Sampling
from m1jax.model import MiniMaxM1


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation of one prompt."""

    tokens: list[int]
    """generated ids, the end token included"""
    log_probs: list[float]
    """natural log, one per token, under the tempered policy before the nucleus cut"""
    finish_reason: Literal["stop", "length"]
    text: str | None
    """the decoded tokens without the end token; None where no tokenizer was given"""


def generate(
    model: MiniMaxM1,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 0.95,
    samples_per_prompt: int = 1,
    seed: int | Sequence[int] = 0,
    end_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Generation]:
    """Continue prompts. The defaults for temperature and top_p are M1's own.

    Args:
        model: the model.
        prompts: token ids, or texts where a tokenizer is given.
        max_new_tokens: limit per continuation.
        temperature: 0 is greedy.
        top_p: nucleus in (0, 1]; 1 switches it off.
        samples_per_prompt: continuations of each prompt; they share its prefill.
        seed: one for the call, or one per prompt. With one per prompt, a prompt's tokens do not depend on what else is
            in the call.
        end_ids: ids that end a continuation; None takes the tokenizer's end of sentence, else the config's
            eos_token_id, else none.
        tokenizer: turns texts into ids and back.

    Returns:
        len(prompts) * samples_per_prompt results, those of one prompt side by side.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, more tokens than the model has positions, an option
            out of range.
    """
    config = model.config
    for name, value, valid in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("samples_per_prompt", samples_per_prompt, samples_per_prompt >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not valid:
            raise UserError(f"generate: {name} = {value} is out of range")
    if isinstance(prompts, str):  # each letter would be a prompt
        raise UserError("generate: prompts is one text; give a list of them")
    if not len(prompts):
        return []
    for number in [seed] if isinstance(seed, int) else seed:
        require_seed(number)
    ids = [_prompt_ids(i, prompt, tokenizer, config.vocab_size) for i, prompt in enumerate(prompts)]
    longest = max(map(len, ids))
    if longest + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"generate: a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} exceed the model's "
            f"{config.max_position_embeddings} positions; shorten the prompt or lower max_new_tokens"
        )
    if end_ids is None:
        eos = config.eos_token_id if tokenizer is None else tokenizer.eos_id
        end_ids = [] if eos is None else [eos]
    if len(end_ids) > END_IDS:
        raise UserError(f"generate: {len(end_ids)} end_ids, at most {END_IDS} are possible")
    sampling = Sampling(
        temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, end_ids=tuple(int(i) for i in end_ids)
    )
    requests = [
        Request(np.array(prompt, np.int32), key, sampling, samples_per_prompt, keep=False)
        for prompt, key in zip(ids, _request_keys(seed, len(ids)))
    ]
    capacity = batch_capacity(
        config,
        model.dtype,
        prompts=len(ids),
        samples=samples_per_prompt,
        prompt_tokens=longest,
        new_tokens=max_new_tokens,
    )
    engine = Engine(ModelRunner(*nnx.split(model), capacity))
    results: list[Generation | None] = [None] * (len(ids) * samples_per_prompt)
    for number, completion in engine.run(requests):
        tokens, stopped = completion.tokens.tolist(), completion.finish == "stop"
        text = None if tokenizer is None else tokenizer.decode(tokens[:-1] if stopped else tokens)
        results[number * samples_per_prompt + completion.sample] = Generation(
            tokens, completion.logp.tolist(), "stop" if stopped else "length", text
        )
    return [result for result in results if result is not None]


def _request_keys(seed: int | Sequence[int], prompts: int) -> list[jax.Array]:
    if isinstance(seed, int):
        base = jax.random.key(seed)
        return [jax.random.fold_in(base, prompt) for prompt in range(prompts)]
    if len(seed) != prompts:
        raise UserError(f"generate: {len(seed)} seeds for {prompts} prompts; give one, or one per prompt")
    return [jax.random.key(number) for number in seed]


def _prompt_ids(index: int, prompt: str | Sequence[int], tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError(f"generate: prompt {index} is a text: give a tokenizer, or token ids")
        try:
            prompt = tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f"generate: prompt {index}: {error}") from error
    if len(prompt) == 0:
        raise UserError(f"generate: prompt {index} is empty; a model needs at least one token to start from")
    wrong = next((int(i) for i in prompt if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise UserError(
            f"generate: prompt {index} holds token {wrong}, but the vocabulary has {vocab_size}; "
            "is the tokenizer another model's?"
        )
    return [int(i) for i in prompt]
