"""Any endpoint that speaks OpenAI's chat completions: one question, one reply, with what it took."""

import dataclasses
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from m1jax.errors import UserError, require_positive
from m1jax.rl.rewards.judge import Unjudged

FailureKind = Literal["timeout", "unreachable", "status", "malformed", "unparsed"]
"""no reply in time; no connection; an error status; a reply of another form than chat completions have; a reply from
which no judgement can be read"""

Messages = Sequence[Mapping[str, str]]


class JudgeFailure(Unjudged):
    """Why there is no judgement; never a judgement itself."""

    def __init__(self, kind: FailureKind, message: str):
        super().__init__(f"judge: {kind}: {message}")
        self.kind: FailureKind = kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Where to ask.

    Raises:
        UserError: a value is out of range.
    """

    url: str
    """up to and including the version, such as http://127.0.0.1:8000/v1"""
    model: str
    key_variable: str = ""
    """name of the environment variable that holds the key; without a key if empty"""
    timeout: float = 120.0
    """seconds for one attempt"""
    retries: int = 4
    """further attempts after one that failed for a passing reason"""
    temperature: float = 0.0
    max_tokens: int = 4096
    """of a reply, thinking included"""
    structured: bool = False
    """ask for JSON of a schema (`response_format`), which the endpoint must enforce, as `m1jax serve` does: then all
    replies parse"""
    dollars_in: float = 0.0
    """per million tokens asked"""
    dollars_out: float = 0.0
    """per million tokens replied"""

    def __post_init__(self) -> None:
        require_positive(self, "timeout", "max_tokens")
        require_positive(self, "retries", "temperature", "dollars_in", "dollars_out", zero=True)
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"judge: url = {self.url!r} must begin with http:// or https://")


@dataclasses.dataclass
class Tally:
    """What was asked and what became of it; may be counted on from several threads."""

    requests: int = 0
    """attempts"""
    retries: int = 0
    replies: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0
    seconds: float = 0.0
    """waited, over all threads"""
    failures: Counter[FailureKind] = dataclasses.field(default_factory=Counter)
    compared: int = 0
    """judgements made more than once"""
    disagreed: int = 0
    """those of them that did not come out alike"""
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def add(self, *, failure: FailureKind | None = None, **amounts: float) -> None:
        """Adds to the fields of these names."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)
            if failure is not None:
                self.failures[failure] += 1

    def figures(self) -> dict[str, float]:
        """For a log: name -> figure since the beginning; failures by their kinds, and the share of disagreement."""
        with self._lock:
            kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type in (int, float)}
            failed = {f"failed_{kind}": float(count) for kind, count in self.failures.items()}
            disagreement = self.disagreed / self.compared if self.compared else 0.0
        return {**kept, **failed, "disagreement": disagreement}


class Reply(NamedTuple):
    """What the model said."""

    text: str
    finished: bool
    """by itself, not at the limit"""


class _Passing(Exception):
    """A failure worth another attempt."""

    def __init__(self, kind: FailureKind, message: str, wait: float | None = None):
        super().__init__(message)
        self.kind: FailureKind = kind
        self.wait = wait


class Endpoint:
    """Asks one model; may be used from several threads.

    Args:
        config: where.
        sleep: waits so many seconds between attempts.

    Raises:
        UserError: the environment variable for the key is not set.
    """

    def __init__(self, config: EndpointConfig, sleep: Callable[[float], None] = time.sleep):
        import httpx

        headers = {}
        if config.key_variable:
            key = os.environ.get(config.key_variable)
            if not key:
                raise UserError(f"judge: the environment variable {config.key_variable} holds no key; set it")
            headers["Authorization"] = f"Bearer {key}"
        self.tally = Tally()
        self._config, self._sleep = config, sleep
        self._client = httpx.Client(base_url=config.url, headers=headers, timeout=config.timeout)
        self._timed_out, self._no_connection = httpx.TimeoutException, httpx.TransportError

    def close(self) -> None:
        self._client.close()

    @property
    def structured(self) -> bool:
        """Whether it can be asked by a schema."""
        return self._config.structured

    def chat(self, messages: Messages, schema: Mapping[str, Any] | None = None) -> Reply:
        """The reply to a conversation; JSON of this schema, if there is one.

        Raises:
            JudgeFailure: there is none, after as many attempts as there are.
            UserError: the endpoint refuses what we ask (key, address, model), which another attempt would not change.
        """
        for attempt in range(self._config.retries + 1):
            began = time.monotonic()
            try:
                reply = self._once(messages, schema)
            except _Passing as error:
                self.tally.add(requests=1, seconds=time.monotonic() - began)
                if attempt == self._config.retries:
                    raise self.failure(error.kind, f"{error}, {attempt + 1} times") from error
                self.tally.add(retries=1)
                self._sleep(error.wait if error.wait is not None else min(0.5 * 2**attempt, 30.0))
            else:
                self.tally.add(requests=1, replies=1, seconds=time.monotonic() - began)
                return reply
        raise AssertionError

    def failure(self, kind: FailureKind, message: str) -> JudgeFailure:
        """The exception for a failure, which is counted."""
        self.tally.add(failure=kind)
        return JudgeFailure(kind, message)

    def _once(self, messages: Messages, schema: Mapping[str, Any] | None) -> Reply:
        config = self._config
        asked: dict[str, Any] = {
            "model": config.model,
            "messages": [dict(message) for message in messages],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        if schema is not None:
            form = {"name": "judgement", "strict": True, "schema": dict(schema)}
            asked["response_format"] = {"type": "json_schema", "json_schema": form}
        try:
            response = self._client.post("chat/completions", json=asked)
        except self._timed_out as error:
            raise _Passing("timeout", f"no reply within {config.timeout:g} seconds") from error
        except self._no_connection as error:
            raise _Passing("unreachable", f"{config.url}: {error}") from error
        code = response.status_code
        if code in (408, 409, 425, 429) or code >= 500:
            wait = response.headers.get("retry-after", "")
            raise _Passing("status", f"{config.url} answered {code}", float(wait) if wait.isdecimal() else None)
        if code != 200:
            raise UserError(
                f"judge: {config.url} answered {code} to model {config.model!r}: {response.text!r:.200}; put right the "
                "address (it ends with the version, /v1), the model or the key"
            )
        try:
            body: dict[str, Any] = response.json()
            choice = body["choices"][0]
            reply = Reply(choice["message"].get("content") or "", choice.get("finish_reason") != "length")
            usage = body.get("usage") or {}
            tokens_in, tokens_out = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Passing(
                "malformed", f"{config.url} answered what is no chat completion: {response.text!r:.80}"
            ) from error
        dollars = (tokens_in * config.dollars_in + tokens_out * config.dollars_out) / 1e6
        self.tally.add(tokens_in=tokens_in, tokens_out=tokens_out, dollars=dollars)
        return reply
