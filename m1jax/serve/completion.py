"""Continuations of texts in OpenAI's form: whole, and in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from m1jax.serve.job import Job, Served
from m1jax.serve.reply import Delta
from m1jax.serve.schema import Completion, TextChoice, TextLogprobs, TokenLogprob, Usage


class CompletionFormat:
    """`writing.Format` of `/v1/completions`; arguments as those of `ChatFormat`."""

    chat = False

    def __init__(self, job: Job, served: Served, *, return_token_ids: bool, usage_in_stream: bool):
        self._job, self._served = job, served
        self._ids, self._usage = return_token_ids, usage_in_stream
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()

    def whole(self, replies: Sequence[Delta], usage: Usage) -> Completion:
        return Completion(
            id=f"cmpl-{self._job.token}",
            created=self._job.created,
            model=self._served.name,
            choices=[self._choice(*pair) for pair in enumerate(replies)],
            usage=usage,
        )

    def _choice(self, index: int, reply: Delta) -> TextChoice:
        assert reply.finish is not None
        return TextChoice(
            index=index,
            text=reply.content,
            finish_reason=reply.finish,
            logprobs=self._logprobs(index, reply.logprobs) if self._job.logprobs else None,
            prompt_token_ids=self._prompt(index) if self._ids else None,
            token_ids=reply.tokens if self._ids else None,
        )

    def _prompt(self, index: int) -> list[int]:
        return self._job.requests[index // self._job.requests[0].samples].tokens.tolist()

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> TextLogprobs:
        offsets = []
        for logprob in logprobs:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(logprob.token)
        return TextLogprobs(
            tokens=[logprob.token for logprob in logprobs],
            token_logprobs=[logprob.logprob for logprob in logprobs],
            top_logprobs=[{likely.token: likely.logprob for likely in logprob.top_logprobs} for logprob in logprobs],
            text_offset=offsets,
        )

    def chunks(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """What a delta of one choice becomes in a stream."""
        if not (delta.content or delta.finish or delta.logprobs or (self._ids and delta.tokens)):
            return
        choice: dict[str, Any] = {"index": index, "text": delta.content, "finish_reason": delta.finish}
        if self._job.logprobs:
            choice["logprobs"] = self._logprobs(index, delta.logprobs).model_dump()
        if self._ids:
            choice["token_ids"] = delta.tokens
            if index not in self._begun:
                self._begun.add(index)
                choice["prompt_token_ids"] = self._prompt(index)
        yield self._chunk([choice])

    def last(self, usage: Usage) -> Iterator[dict[str, Any]]:
        """What stands behind all choices of a stream."""
        if self._usage:
            yield {**self._chunk([]), "usage": usage.model_dump()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self._job.token}",
            "object": "text_completion",
            "created": self._job.created,
            "model": self._served.name,
            "choices": choices,
        }
