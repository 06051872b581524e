"""The engine's thread."""

import asyncio
import time

import jax
import numpy as np

from m1jax.inference import Request, Sampling
from m1jax.serve import backend as module
from m1jax.serve.backend import Backend


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
