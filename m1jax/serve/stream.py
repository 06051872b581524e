"""Replies as server-sent events, while they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class EventStream(Response):
    """Sends pieces as they come; its source is closed as soon as the client leaves.

    Args:
        first: the first piece, which has come already: until then there could have been an error in its place.
        rest: the others.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
            async for piece in self._rest:
                await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await unless_gone(work(), receive)
        finally:
            await self._rest.aclose()


async def unless_gone(work: Awaitable[T], receive: Receive) -> T | None:
    """What a coroutine returns; None where the client leaves before, and the coroutine is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: str) -> str:
    return f"data: {data}\n\n"


DONE = event("[DONE]")
