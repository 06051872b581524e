"""A job on the engine, told as it is written: whole, or in pieces."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Protocol

import pydantic

from m1jax.inference import Finished
from m1jax.serve.backend import Backend
from m1jax.serve.errors import ApiError
from m1jax.serve.job import Job, Served
from m1jax.serve.metrics import Metrics
from m1jax.serve.reply import Delta, Reply
from m1jax.serve.schema import Usage, compact
from m1jax.serve.stream import DONE, event


class Format(Protocol):
    """How a job's replies are told. They are numbered through all prompts."""

    chat: bool
    """whether thoughts and calls are taken out of the text"""

    def whole(self, replies: Sequence[Delta], usage: Usage) -> pydantic.BaseModel:
        """All at once."""
        ...

    def chunks(self, index: int, delta: Delta) -> Iterable[dict[str, Any]]:
        """What one reply has gained, for a stream."""
        ...

    def last(self, usage: Usage) -> Iterable[dict[str, Any]]:
        """What stands behind all replies of a stream."""
        ...


class Writing:
    """One job and its replies. `start`: when its request came (`time.monotonic`)."""

    def __init__(self, job: Job, served: Served, backend: Backend, metrics: Metrics, *, chat: bool, start: float):
        self._job, self._served, self._backend, self._metrics = job, served, backend, metrics
        self._start = start
        self._samples = job.requests[0].samples
        self.replies = [Reply(job, served.tokenizer, chat) for _ in range(self._samples * len(job.requests))]

    @property
    def usage(self) -> Usage:
        prompt, written = self._job.prompt_tokens, sum(reply.tokens for reply in self.replies)
        return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)

    async def deltas(self) -> AsyncGenerator[dict[int, Delta]]:
        """What the replies gain, step by step.

        Raises:
            ApiError: the engine takes no more, or has failed.
        """
        begun = False
        self._metrics.prompt_tokens.inc(self._job.prompt_tokens)
        try:
            async with self._backend.work(self._job.requests, self._served.limits.seconds) as work:
                async for events in work:
                    if not begun:
                        begun = True
                        self._metrics.first_token.observe(time.monotonic() - self._start)
                    gained: dict[int, Delta] = {}
                    for number, told in events:
                        index = number * self._samples + told.sample
                        reply, delta = self.replies[index], gained.setdefault(index, Delta())
                        if isinstance(told, Finished):
                            reply.close(told.completion, delta)
                        elif not reply.enough:
                            reply.feed(told, delta)
                            if reply.enough:
                                work.cancel(number, told.sample)
                    yield gained
        finally:
            self._metrics.completion_tokens.inc(self.usage.completion_tokens)
            self._metrics.reply.observe(time.monotonic() - self._start)


async def whole(writing: Writing, form: Format) -> pydantic.BaseModel:
    """All that was written, in the end."""
    replies = [Delta() for _ in writing.replies]
    async for gained in writing.deltas():
        for index, delta in gained.items():
            replies[index].add(delta)
    return form.whole(replies, writing.usage)


async def streamed(writing: Writing, form: Format) -> AsyncGenerator[bytes]:
    """Server-sent events. Raises ApiError only before the first; later it is an event like others."""
    begun = False
    deltas = writing.deltas()
    try:
        async for gained in deltas:
            text = b"".join(event(compact(chunk)) for index in gained for chunk in form.chunks(index, gained[index]))
            if text:
                begun = True
                yield text
        yield b"".join(event(compact(chunk)) for chunk in form.last(writing.usage)) + DONE
    except ApiError as error:
        if not begun:
            raise
        yield event(compact(error.body))
    finally:
        await deltas.aclose()
