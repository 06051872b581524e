"""The engine's thread."""

import asyncio
import contextlib
import gc
import time
import weakref

import jax
import numpy as np
import pytest

from m1jax.inference import Completion, Finished, Request, Sampling, Ticket, Wrote
from m1jax.serve import backend as module
from m1jax.serve.backend import Backend, Work
from m1jax.serve.errors import ApiError


def test_requests_that_come_together_begin_together(make_engine, monkeypatch):
    """Also where the loop is busy for a while before it comes to the second."""
    monkeypatch.setattr(module, "TOGETHER", 5.0)
    backend = Backend(make_engine, 8)
    engine = backend._engine
    step, seen = engine.step, []

    def watched():
        seen.append(len(backend._places))
        return step()

    monkeypatch.setattr(engine, "step", watched)

    async def ask(busy):
        time.sleep(busy)
        request = Request(np.arange(1, 5, dtype=np.int32), jax.random.key(0), Sampling(max_new_tokens=2))
        async with backend.work([request], 60) as work:
            async for _ in work:
                pass

    async def main():
        backend.start()
        await asyncio.gather(ask(0.0), ask(0.05), ask(0.05))
        await asyncio.to_thread(backend.close)

    asyncio.run(main())
    assert seen[0] == 3


def test_pieces_come_by_the_beat_but_the_first_and_the_last_at_once(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.5)
    nothing = np.zeros(0)
    wrote = Wrote(Ticket(0), 0, (1,), (0.0,), ())
    finished = Finished(Ticket(0), 0, Completion(*[nothing] * 5, None, "stop", 0))
    seen = []

    async def main():
        request = Request(np.arange(1, 5, dtype=np.int32), jax.random.key(0), Sampling(max_new_tokens=9))
        work, start = Work(Backend.__new__(Backend), [request]), time.monotonic()

        async def read():
            async for events in work:
                seen.append((len(events), time.monotonic() - start))

        reading = asyncio.create_task(read())
        work.put([(0, wrote)])
        await asyncio.sleep(0.1)
        for _ in range(3):
            work.put([(0, wrote)])
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.4)
        work.put([(0, wrote)])
        work.put([(0, finished)])
        await reading

    asyncio.run(main())
    (first, at), (more, later), (last, end) = seen
    assert (first, more, last) == (1, 3, 2)
    assert at < 0.1
    assert at + 0.49 < later  # by the beat
    assert end < later + 0.4  # not by it


def test_a_failed_engine_is_gone_before_the_next_is_made(make_engine):
    """A device has no room for two."""
    made, alive = [], []

    def make():
        alive.extend(reference() is not None for reference in made)
        engine = make_engine()
        made[:] = weakref.ref(engine), weakref.ref(engine._runner)
        return engine

    backend = Backend(make, 8)
    backend._engine._runner.prefill = None
    gc.freeze()  # as the server does

    async def main():
        backend.start()
        request = Request(np.arange(1, 5, dtype=np.int32), jax.random.key(0), Sampling(max_new_tokens=2))
        for fails in (True, False):
            async with backend.work([request], 60) as work:
                with pytest.raises(ApiError, match="The engine failed") if fails else contextlib.nullcontext():
                    async for _ in work:
                        pass
        await asyncio.to_thread(backend.close)

    try:
        asyncio.run(main())
    finally:
        gc.unfreeze()
    assert alive == [False, False]
