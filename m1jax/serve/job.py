"""From a client's request to the engine's."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Sequence

import jax
import numpy as np

from m1jax.chat import Tokenizer, Tool, as_tools, encode_prompt, partings
from m1jax.errors import UserError
from m1jax.inference import RepetitionStop, Request, Sampling, ThinkingBudget
from m1jax.inference.capacity import Capacity
from m1jax.inference.thinking import PRESETS, thinking_budget
from m1jax.serve.errors import ApiError
from m1jax.serve.grammar import Grammars
from m1jax.serve.limits import Limits
from m1jax.serve.schema import ChatRequest, CompletionRequest, GenerationRequest, NamedTool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model as the server knows it."""

    name: str
    tokenizer: Tokenizer
    capacity: Capacity
    limits: Limits
    grammars: Grammars
    thinking: int | None = None
    """tokens of a thought where a request does not say"""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        _key(0)  # compiled before the first request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the engine is asked for, and how its tokens are to be told."""

    requests: Sequence[Request]
    """one for each prompt"""
    stops: Sequence[str]
    tools: Sequence[Tool] | None = None
    """that may be called; None: `<tool_calls>` is text"""
    most_calls: int | None = None
    json: bool = False
    """the answer is one JSON value: tags in it are text"""
    logprobs: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    token: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)


def chat_job(asked: ChatRequest, served: Served) -> Job:
    """Raises ApiError 400 for what cannot be served."""
    try:
        tools = as_tools([tool.model_dump(exclude_none=True) for tool in asked.tools or []])
        choice = asked.tool_choice or "auto"
        messages = [message.model_dump(exclude_none=True) for message in asked.messages]
        offered = [] if choice == "none" else tools
        prompt = encode_prompt(served.tokenizer, messages, [tool.schema for tool in offered])
        constraint, is_json = None, False
        if isinstance(choice, NamedTool):
            chosen = [tool for tool in tools if tool.name == choice.function.name]
            if not chosen:
                raise ApiError(400, f"There is no tool {choice.function.name!r} among the tools.", param="tool_choice")
            constraint = served.grammars.calls(chosen, 1)
        elif choice == "required":
            if not tools:
                raise ApiError(400, "tool_choice is 'required', and there are no tools.", param="tool_choice")
            constraint = served.grammars.calls(tools, None if asked.parallel_tool_calls else 1)
        elif asked.response_format is not None and asked.response_format.type != "text":
            form = asked.response_format
            schema = {"type": "object"} if form.type == "json_object" else form.json_schema.schema_
            constraint, is_json = served.grammars.json(schema), True
    except UserError as error:
        raise ApiError(400, str(error)) from error
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    request = _request(asked, served, prompt, asked.top_logprobs or 0)
    return Job(
        requests=[
            dataclasses.replace(request, constraint=constraint, junctions=partings(served.tokenizer, prompt, messages))
        ],
        stops=asked.stops,
        tools=offered or None,
        most_calls=None if asked.parallel_tool_calls else 1,
        json=is_json,
        logprobs=asked.logprobs,
    )


def completion_job(asked: CompletionRequest, served: Served) -> Job:
    """Raises ApiError 400 for what cannot be served."""
    requests = []
    for prompt in asked.prompts:
        try:
            tokens = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        except UserError as error:
            raise ApiError(400, str(error), param="prompt") from error
        requests.append(_request(asked, served, np.array(tokens, np.int32), asked.logprobs or 0))
    if asked.seed is not None:
        requests = [
            dataclasses.replace(request, key=jax.random.fold_in(request.key, number)) if number else request
            for number, request in enumerate(requests)
        ]
    return Job(requests=requests, stops=asked.stops, logprobs=asked.logprobs is not None)


def _request(asked: GenerationRequest, served: Served, prompt: np.ndarray, top: int) -> Request:
    tokenizer, limits = served.tokenizer, served.limits
    return Request(
        prompt,
        _key(secrets.randbits(32) if asked.seed is None else asked.seed % 2**32),
        Sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_new_tokens=_room(asked.limit, len(prompt), served.capacity, limits.new_tokens),
            end_ids=(tokenizer.eos_id,),
            repetition_stop=RepetitionStop(),
            thinking_budget=_budget(asked, served),
        ),
        samples=asked.n,
        top=top,
    )


def _key(seed: int) -> jax.Array:
    """`jax.random.key`, on the host where JAX may: an accelerator would first end what it has begun."""
    with _on_host():
        return _made_key(np.uint32(seed))


_made_key = jax.jit(jax.random.key)


def _on_host() -> contextlib.AbstractContextManager[object]:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to leave it alone
        return contextlib.nullcontext()


def _budget(asked: GenerationRequest, served: Served) -> ThinkingBudget | None:
    tokens = served.thinking if asked.thinking_budget is None else asked.thinking_budget
    if tokens is None:
        return None
    return thinking_budget(served.tokenizer, PRESETS[tokens] if isinstance(tokens, str) else tokens)


def _room(asked: int | None, prompt: int, capacity: Capacity, most: int) -> int:
    """How many tokens a reply may have; raises ApiError 400 where there is no place for them."""
    if prompt == 0:
        raise ApiError(400, "The prompt is empty; a model needs at least one token to start from.", param="prompt")
    context = capacity.max_length
    over = prompt + (asked or 1) - context
    if over > 0:
        wanted = "" if asked is None else f" and max_tokens = {asked}"
        raise ApiError(
            400,
            f"This model's context is {context} tokens, and a prompt of {prompt} tokens{wanted} exceeds it by {over}; "
            "shorten the conversation" + ("." if asked is None else " or lower max_tokens."),
            param="messages",
            code="context_length_exceeded",
        )
    if asked is not None and asked > most:
        raise ApiError(400, f"max_tokens = {asked}, but this server writes at most {most}.", param="max_tokens")
    return min(most, context - prompt) if asked is None else asked
