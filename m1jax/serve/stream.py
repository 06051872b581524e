"""Replies as server-sent events, while they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class EventStream(Response):
    """Sends pieces as they come; their source is closed as soon as the client leaves.

    Nothing is sent before the first piece: until then there may be an error in its place, which is raised.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def work() -> None:
            nonlocal begun
            async for piece in self._pieces:
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await unless_gone(work(), receive)
        finally:
            await self._pieces.aclose()
        if not begun:
            await GONE(scope, receive, send)


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


GONE = Response(status_code=499)
"""For a client that has left; nobody reads it."""


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")
