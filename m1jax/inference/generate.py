"""Generation for a batch of prompts in one jitted program: one prefill, then decode steps until every row has ended."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from m1jax.chat import Tokenizer
from m1jax.errors import UserError, require_seed
from m1jax.inference.sampling import sample
from m1jax.model import Cache, MiniMaxM1
from m1jax.sharding import ambient_mesh
from pallas_kernels import target_platform


class Samples(NamedTuple):
    """What `decode` wrote for each row; positions from `lengths` on hold zeros."""

    tokens: Int[Array, "rows new"]
    """the end token included, where it came"""
    log_probs: Float[Array, "rows new"]
    """of the sampled tokens under the tempered policy (see `sampling.sample`)"""
    lengths: Int[Array, " rows"]
    finished: Bool[Array, " rows"]
    """ended by an end token, not by the limit"""


@functools.partial(jax.jit, static_argnames=("graph", "samples_per_prompt", "max_new_tokens", "nucleus"))
def decode(
    graph: Any,
    params: Any,
    prompts: Int[Array, "prompts time"],
    lengths: Int[Array, " prompts"],
    keys: Key[Array, " rows"],
    end_ids: Int[Array, " ends"],
    temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float = 1.0,
    *,
    samples_per_prompt: int = 1,
    max_new_tokens: int,
    nucleus: bool = False,
) -> Samples:
    """Continue each prompt `samples_per_prompt` times, all rows in step.

    Args:
        graph, params: `nnx.split(model)`.
        prompts: [P, T] int32, padded on the right.
        lengths: [P] real tokens per prompt, at least 1.
        keys: [P * G] one key per row; token t of a row is drawn with fold_in(key, t). Row p * G + g belongs to prompt
            p.
        end_ids: token ids that end a row.
        temperature, top_p: as in `sampling.sample`; top_p is looked at only if nucleus.
        samples_per_prompt: G; the samples of a prompt share its prefill.
        max_new_tokens: limit per row.
        nucleus: whether to cut the distribution at top_p.

    Returns:
        `Samples` of P * G rows. The loop ends as soon as every row has.
    """
    model: MiniMaxM1 = nnx.merge(graph, params)
    if target_platform() == "cpu" and ambient_mesh() is None:
        model = model.unstacked()
    cache = model.init_cache(prompts.shape[0], prompts.shape[1] + max_new_tokens)
    logits, cache = model(prompts, cache, lengths=lengths, last_only=True)
    logits = jnp.repeat(logits, samples_per_prompt, axis=0)
    cache = cache.repeat(samples_per_prompt)
    rows = logits.shape[0]
    start = Samples(
        jnp.zeros((rows, max_new_tokens), jnp.int32),
        jnp.zeros((rows, max_new_tokens), jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )

    def draw(step: jax.Array, logits: jax.Array, out: Samples) -> tuple[jax.Array, Samples]:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        options = jnp.full(rows, temperature, jnp.float32), jnp.full(rows, top_p if nucleus else 1.0, jnp.float32)
        token, log_prob, _ = sample(logits, step_keys, temperature=options[0], top_p=options[1])
        alive = ~out.finished
        return token, Samples(
            out.tokens.at[:, step].set(jnp.where(alive, token, 0)),
            out.log_probs.at[:, step].set(jnp.where(alive, log_prob, 0.0)),
            out.lengths + alive,
            out.finished | jnp.isin(token, end_ids),
        )

    def unfinished(carry: tuple[jax.Array, jax.Array, Cache, Samples]) -> jax.Array:
        step, _, _, out = carry
        return (step < max_new_tokens) & ~jnp.all(out.finished)

    def advance(carry: tuple[jax.Array, jax.Array, Cache, Samples]) -> tuple[jax.Array, jax.Array, Cache, Samples]:
        step, token, cache, out = carry
        logits, cache = model(token[:, None], cache, last_only=True)
        token, out = draw(step, logits, out)
        return step + 1, token, cache, out

    token, out = draw(jnp.int32(0), logits, start)
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(1), token, cache, out))[-1]


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
    # Powers of two: a handful of compiled shapes serve prompts of any length.
    time = min(1 << (longest - 1).bit_length(), config.max_position_embeddings - max_new_tokens)
    keys = _request_keys(seed, len(ids), samples_per_prompt)
    graph, params = nnx.split(model)
    samples = jax.device_get(
        decode(
            graph,
            params,
            *pad_prompts(ids, time),
            keys,
            jnp.asarray(end_ids, jnp.int32),
            jnp.float32(temperature),
            jnp.float32(top_p),
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=max_new_tokens,
            nucleus=top_p < 1,
        )
    )
    results = []
    for tokens, log_probs, length, finished in zip(*samples):
        tokens = tokens[:length].tolist()
        text = None if tokenizer is None else tokenizer.decode(tokens[:-1] if finished else tokens)
        results.append(Generation(tokens, log_probs[:length].tolist(), "stop" if finished else "length", text))
    return results


def pad_prompts(prompts: Sequence[Sequence[int]], time: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [P, time] int32 and lengths [P] int32."""
    padded = np.zeros((len(prompts), time), np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    return padded, np.array([len(prompt) for prompt in prompts], np.int32)


def _request_keys(seed: int | Sequence[int], prompts: int, samples: int) -> jax.Array:
    if isinstance(seed, int):
        per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(prompts))
    elif len(seed) == prompts:
        per_prompt = jax.vmap(jax.random.key)(jnp.asarray(seed, jnp.uint32))
    else:
        raise UserError(f"generate: {len(seed)} seeds for {prompts} prompts; give one, or one per prompt")
    return jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(samples)))(per_prompt).reshape(
        -1
    )


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
