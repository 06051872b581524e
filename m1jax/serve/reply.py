"""From the engine's tokens to what a client reads: text, thought, calls, log-probabilities, and why it ended."""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
from collections.abc import Sequence
from typing import Any

from m1jax.chat import CallError, Content, Event, Reasoning, StreamParser, TextStream, Tokenizer, ToolCall
from m1jax.inference import Completion, Wrote
from m1jax.serve.errors import ApiError
from m1jax.serve.job import Job
from m1jax.serve.schema import Call, FinishReason, FunctionCall, Likely, TokenLogprob

LEAST = -9999.0
"""A log-probability that JSON can hold, in place of minus infinity."""


class StopText:
    """Finds the first of some texts in one that comes in pieces; nothing of it is given out."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is certain by now."""
        if not self._stops or self.found:
            return "" if self.found else text
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max(n for stop in self._stops for n in range(len(stop)) if text.endswith(stop[:n]))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def close(self) -> str:
        """What was kept back."""
        text, self._held = self._held, ""
        return text


@dataclasses.dataclass
class Delta:
    """What some tokens add to a reply, and perhaps its end."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish: FinishReason | None = None

    def add(self, more: Delta) -> None:
        """What came after."""
        self.content += more.content
        self.reasoning += more.reasoning
        self.calls += more.calls
        self.tokens += more.tokens
        self.logprobs += more.logprobs
        self.finish = more.finish


class Reply:
    """One sample of a job.

    Args:
        chat: whether thoughts and calls are taken out of the text.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, chat: bool):
        self._job, self._tokenizer = job, tokenizer
        self._text = TextStream(tokenizer)
        self._stop = StopText(job.stops)
        self._parser = StreamParser(job.tools) if chat else None
        self._names = {tool.name for tool in job.tools or ()}
        self.calls = 0
        self.tokens = 0

    @property
    def enough(self) -> bool:
        """Whether nothing that is still written can be of interest."""
        return self._stop.found

    def feed(self, wrote: Wrote, delta: Delta) -> None:
        """Adds what these tokens bring."""
        if not self._job.stops and not self._job.logprobs:  # nothing can end between them
            self.tokens += len(wrote.tokens)
            delta.tokens += wrote.tokens
            self._add(delta, self._text.feed(t for t in wrote.tokens if t != self._tokenizer.eos_id))
            return
        for place, token in enumerate(wrote.tokens):
            if self.enough:
                break
            self.tokens += 1
            delta.tokens.append(token)
            if self._job.logprobs:
                delta.logprobs.append(self._logprob(token, wrote.logp[place], wrote.top[place] if wrote.top else ()))
            if token != self._tokenizer.eos_id:
                self._add(delta, self._text.feed([token]))

    def close(self, completion: Completion, delta: Delta) -> None:
        """Adds what was kept back, and why it has ended.

        Raises:
            ApiError: the engine found that the model's numbers are none.
        """
        if completion.finish == "fault":
            raise ApiError(500, "The model's logits are no numbers; are its weights damaged?")
        if not self.enough:
            self._add(delta, self._text.close())
        if self._parser is not None:
            self._take(delta, self._parser.close())
        if not self.enough:
            delta.content += self._stop.close()
        stopped = self.enough or completion.finish == "stop"
        delta.finish = "tool_calls" if self.calls else "stop" if stopped else "length"

    def _add(self, delta: Delta, text: str) -> None:
        if self._parser is None:
            delta.content += self._stop.feed(text)
        else:
            self._take(delta, self._parser.feed(text))

    def _take(self, delta: Delta, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Content):
                delta.content += self._stop.feed(event.text)
                if self._job.json and self._parser is not None:
                    rest, self._parser = self._parser.close(), None
                    self._take(delta, rest)
            elif isinstance(event, Reasoning):
                delta.reasoning += event.text
            elif isinstance(event, ToolCall):
                self._call(delta, event.name, event.arguments)
            elif (arguments := self._usable(event)) is not None:
                self._call(delta, event.name, arguments)
            else:
                delta.content += self._stop.feed(event.text)

    def _usable(self, error: CallError) -> dict[str, Any] | None:
        """The arguments of a call to a tool that there is, though they do not fit its schema: the client's tool says
        better what is wrong with them. Any other broken call is text."""
        if error.name not in self._names:
            return None
        try:
            arguments = json.loads(error.text, strict=False, parse_float=_finite).get("arguments")
        except (ValueError, RecursionError, AttributeError):
            return None
        return arguments if isinstance(arguments, dict) else None

    def _call(self, delta: Delta, name: str, arguments: dict[str, Any]) -> None:
        if self._job.most_calls is not None and self.calls >= self._job.most_calls:
            return
        self.calls += 1
        function = FunctionCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
        delta.calls.append(Call(id=f"call_{secrets.token_hex(12)}", function=function))

    def _logprob(self, token: int, logp: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        likely = [self._likely(*pair) for pair in top]
        return TokenLogprob(**self._likely(token, logp).model_dump(), top_logprobs=likely)

    def _likely(self, token: int, logp: float) -> Likely:
        text = self._tokenizer.decode([token])
        whole = None if "\ufffd" in text else list(text.encode())
        return Likely(token=text, logprob=max(logp, LEAST), bytes=whole)


def _finite(text: str) -> float:
    """The number, or the largest that there is."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))
