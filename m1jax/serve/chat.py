"""Chat replies in OpenAI's form: whole, and in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from m1jax.serve.job import Job, Served
from m1jax.serve.reply import Delta
from m1jax.serve.schema import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    MessageOut,
    Usage,
)


class ChatFormat:
    """`writing.Format` of a chat.

    Args:
        return_token_ids, usage_in_stream: as the request asks.
    """

    chat = True

    def __init__(self, job: Job, served: Served, *, return_token_ids: bool, usage_in_stream: bool):
        self._job, self._served = job, served
        self._ids, self._usage = return_token_ids, usage_in_stream
        self._begun: set[int] = set()
        self._calls: dict[int, int] = {}

    def whole(self, replies: Sequence[Delta], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=f"chatcmpl-{self._job.token}",
            created=self._job.created,
            model=self._served.name,
            choices=[self._choice(*pair) for pair in enumerate(replies)],
            usage=usage,
            prompt_token_ids=self._job.requests[0].tokens.tolist() if self._ids else None,
        )

    def _choice(self, index: int, reply: Delta) -> ChatChoice:
        assert reply.finish is not None
        return ChatChoice(
            index=index,
            message=MessageOut(
                content=reply.content if reply.content.strip() or not reply.calls else None,
                reasoning_content=reply.reasoning or None,
                tool_calls=reply.calls or None,
            ),
            finish_reason=reply.finish,
            logprobs=ChatLogprobs(content=reply.logprobs) if self._job.logprobs else None,
            token_ids=reply.tokens if self._ids else None,
        )

    def chunks(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """What a delta of one choice becomes in a stream."""
        message: dict[str, Any] = {}
        if index not in self._begun:
            self._begun.add(index)
            message = {"role": "assistant", "content": ""}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if delta.content:
            message["content"] = delta.content
        if delta.calls:
            start = self._calls.get(index, 0)
            self._calls[index] = start + len(delta.calls)
            message["tool_calls"] = [
                {"index": start + number, **call.model_dump()} for number, call in enumerate(delta.calls)
            ]
        if not (message or delta.finish or delta.logprobs or (self._ids and delta.tokens)):
            return
        choice: dict[str, Any] = {"index": index, "delta": message, "finish_reason": delta.finish}
        if self._job.logprobs:
            choice["logprobs"] = {"content": [logprob.model_dump() for logprob in delta.logprobs]}
        if self._ids:
            choice["token_ids"] = delta.tokens
        yield self._chunk([choice])

    def last(self, usage: Usage) -> Iterator[dict[str, Any]]:
        """What stands behind all choices of a stream."""
        if self._usage:
            yield {**self._chunk([]), "usage": usage.model_dump()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {
            "id": f"chatcmpl-{self._job.token}",
            "object": "chat.completion.chunk",
            "created": self._job.created,
            "model": self._served.name,
            "choices": choices,
        }
        if self._ids and len(self._begun) == 1 and choices and "role" in choices[0]["delta"]:
            chunk["prompt_token_ids"] = self._job.requests[0].tokens.tolist()
        return chunk
