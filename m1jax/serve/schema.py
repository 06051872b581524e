"""What comes in and what goes out, as OpenAI names it. What this server cannot do is refused by name."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import Field

from m1jax.serve.errors import ApiError

MOST_LOGPROBS = 20
"""of the likeliest tokens in each place"""

Neutral = Annotated[float, Field(ge=0, le=0)]
"""a penalty, which this server does not know"""
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class In(pydantic.BaseModel):
    """Something that a client sends."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class StreamOptions(In):
    include_usage: bool = False


class GenerationRequest(In):
    """What all requests have in common."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(0.95, gt=0, le=1)
    n: int = Field(1, ge=1, le=64)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    return_token_ids: bool = False
    """the tokens of the prompt and of each choice beside their text"""
    thinking_budget: Annotated[int, Field(ge=1)] | Literal["40k", "80k"] | None = None
    """tokens that a thought may have; None: the server's own"""
    user: str | None = None
    frequency_penalty: Neutral = 0
    presence_penalty: Neutral = 0

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def takes_time(self) -> bool:
        """Whether to prepare it may take long though it is short: there are many prompts, or schemas to compile."""
        return False

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """A text, or tokens, to be continued."""

    prompt: str | list[Token] | list[str] | list[list[Token]] = Field(min_length=1)
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def takes_time(self) -> bool:
        return len(self.prompts) > 1

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them, also where there is one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # pyright: ignore[reportReturnType]


class TextPart(In):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)
    type: Literal["text"]
    text: str


class CalledFunction(In):
    model_config = pydantic.ConfigDict(extra="ignore", strict=True)
    name: str
    arguments: str | dict[str, Any] = "{}"


class CallIn(In):
    model_config = pydantic.ConfigDict(extra="ignore", strict=True)
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class MessageIn(In):
    """A message of the conversation; what M1's format has no place for is not read."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallIn] | None = None


class FunctionIn(In):
    name: str = Field(min_length=1, max_length=200)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(In):
    type: Literal["function"] = "function"
    function: FunctionIn


class FunctionName(In):
    name: str


class NamedTool(In):
    type: Literal["function"] = "function"
    function: FunctionName


class TextFormat(In):
    type: Literal["text"]


class JsonObjectFormat(In):
    type: Literal["json_object"]


class JsonSchema(In):
    name: str = "reply"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(In):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(GenerationRequest):
    """A conversation whose next turn the model writes."""

    messages: list[MessageIn] = Field(min_length=1)
    tools: list[ToolIn] | None = Field(None, max_length=512)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def takes_time(self) -> bool:
        return bool(self.tools) or self.response_format is not None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Out(pydantic.BaseModel):
    """Something that the server answers."""


class Usage(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FunctionCall(Out):
    name: str
    arguments: str
    """a JSON object"""


class Call(Out):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class MessageOut(Out):
    role: Literal["assistant"] = "assistant"
    content: str | None
    """None where there are calls and nothing else was said"""
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class Likely(Out):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(Out):
    content: list[TokenLogprob]


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(Out):
    index: int
    message: MessageOut
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Out):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class TextLogprobs(Out):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Out):
    index: int
    text: str
    finish_reason: FinishReason
    logprobs: TextLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(Out):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(Out):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "m1jax"
    max_model_len: int
    """tokens of a prompt and its reply"""


class ModelList(Out):
    object: Literal["list"] = "list"
    data: list[Model]


class Problem(Out):
    message: str
    type: str
    param: str | None
    code: str | None


class Failure(Out):
    error: Problem


class Health(Out):
    status: Literal["ok", "draining", "failed"]
    running: int
    waiting: int


R = TypeVar("R", bound=In)


def parsed(kind: type[R], body: bytes) -> R:
    """The request that a body is; raises ApiError 400 for what is no JSON, 422 for what is no such request."""
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)
        if first[0]["type"] == "json_invalid":
            raise ApiError(400, f"The body is no JSON: {first[0].get('ctx', {}).get('error')}.") from None
        more = f" ({len(first) - 1} more problems)" if len(first) > 1 else ""
        place = _place(first[0]["loc"])
        raise ApiError(422, f"{place}: {first[0]['msg']}{more}.", param=place) from None


def _place(loc: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".") or "body"


compact = pydantic_core.to_json
"""A value as JSON without spaces, five times as fast as json's."""
