"""The engine in a thread of its own, for coroutines: one thread steps it, everybody else sends and waits.

A step that fails ends the requests that are in work, and a new engine takes the next ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence

from flax import nnx

from m1jax.errors import UserError
from m1jax.inference import Engine, Event, Finished, Request, Ticket
from m1jax.inference.memory import capacity_for
from m1jax.inference.runner import ModelRunner
from m1jax.inference.scheduler import Counts
from m1jax.model import MiniMaxM1
from m1jax.serve.errors import ApiError
from m1jax.serve.schema import MOST_LOGPROBS

log = logging.getLogger("m1jax.serve")

QUIET, TURNS = 0.001, 3
"""Seconds without a further request, and then turns of the loop, after which an engine that was idle begins: what the
loop has read of a request takes two turns to become one here."""
TOGETHER = 0.02
"""Seconds that it waits at most."""

BEAT = 0.02
"""Seconds between two pieces of a reply, unless it ends. A piece costs as much for one token as for many, of the
interpreter that the engine needs too, and a fast device writes a few hundred tokens of 32 replies in that time."""


def engines(model: MiniMaxM1, *, rows: int | None = None, max_length: int | None = None) -> Callable[[], Engine]:
    """Makes engines of one size for a model, one after the other; sizes as in `capacity_for`, which may raise."""
    capacity = capacity_for(model.config, model.dtype, rows=rows, max_length=max_length)
    graph, params = nnx.split(model)
    return lambda: Engine(ModelRunner(graph, params, capacity, top=MOST_LOGPROBS, constrains=True))


@dataclasses.dataclass(frozen=True)
class Failed:
    """Nothing more will come."""

    error: ApiError


class Work:
    """Requests that belong together, in the engine, as a coroutine sees them.

    `async for events in work`: lists of (number of the request, event), until all samples have ended.

    Raises:
        ApiError: from the iteration: 400, the engine refuses a request; 500, it or the engine has failed; 503, the
            server stops.
    """

    def __init__(self, backend: Backend, requests: Sequence[Request]):
        self.requests = requests
        self._backend = backend
        self.samples = self.left = sum(request.samples for request in requests)
        self._inbox: list[list[tuple[int, Event]] | Failed] = []
        self._told, self._waits, self._beat = asyncio.Event(), False, 0.0

    def cancel(self, number: int | None = None, sample: int | None = None) -> None:
        """End everything, or one sample of one request; its end is told like any other."""
        self._backend.tell(_Cancel(self, number, sample))

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Event]]]:
        while self.left:
            await self._told.wait()
            self._told.clear()
            inbox, self._inbox = self._inbox, []
            events: list[tuple[int, Event]] = []
            for told in inbox:
                if isinstance(told, Failed):
                    raise told.error
                events += told
            if events:
                self._beat = asyncio.get_running_loop().time()
                self.left -= sum(isinstance(event, Finished) for _, event in events)
                yield events

    def put(self, told: list[tuple[int, Event]] | Failed) -> None:
        """From within the loop."""
        self._inbox.append(told)
        if isinstance(told, Failed) or any(isinstance(event, Finished) for _, event in told):
            self._wake()
        elif not self._waits:
            self._waits = True
            asyncio.get_running_loop().call_at(self._beat + BEAT, self._wake)

    def _wake(self) -> None:
        self._waits = False
        self._told.set()


@dataclasses.dataclass(frozen=True)
class _Submit:
    work: Work


@dataclasses.dataclass(frozen=True)
class _Cancel:
    work: Work
    number: int | None
    sample: int | None


class _Close:
    pass


@dataclasses.dataclass
class _Place:
    """Where the events of a ticket go."""

    work: Work
    number: int
    left: int
    """samples that have not ended"""


class Backend:
    """Runs an engine.

    Args:
        make: gives an engine; called at once, and again after a step has failed.
        queue_limit: samples that may wait beyond those that the engine has rows for.
    """

    def __init__(self, make: Callable[[], Engine], queue_limit: int):
        self._make = make
        self._engine: Engine | None = make()
        self.capacity = self._engine.capacity
        self._most = self.capacity.rows * self.capacity.parts + queue_limit
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Close] = queue.SimpleQueue()
        self._places: dict[Ticket, _Place] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ended = False
        self._open: set[Work] = set()
        self._before = Counts()
        self.failures = 0
        self.draining = False

    @property
    def _live(self) -> int:
        return sum(work.samples for work in self._open)

    @property
    def running(self) -> int:
        """Samples in work."""
        return min(self._live, self.capacity.rows * self.capacity.parts)

    @property
    def waiting(self) -> int:
        """Samples without a row."""
        return self._live - self.running

    @property
    def alive(self) -> bool:
        """Whether there is an engine."""
        return not self._ended

    @property
    def counts(self) -> Counts:
        engine = self._engine
        return self._before if engine is None else self._before + engine.counts

    def start(self) -> None:
        """From within the loop that requests come from."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def drain(self, seconds: float) -> None:
        """Take no more requests, and cut after so many seconds what is still being written. From within the loop."""
        self.draining = True
        asyncio.get_running_loop().call_later(seconds, lambda: [work.cancel() for work in self._open])

    def close(self) -> None:
        """Stop the thread; who still waits is told so."""
        self.tell(_Close())
        self._thread.join()

    def tell(self, message: _Submit | _Cancel | _Close) -> None:
        self._inbox.put(message)

    @contextlib.asynccontextmanager
    async def work(self, requests: Sequence[Request], seconds: float) -> AsyncIterator[Work]:
        """Requests in the engine; those not at their end when this is left, or after so many seconds, are cancelled.

        Raises:
            ApiError: 429, there are too many; 503, the server is about to stop.
        """
        work, loop = Work(self, requests), asyncio.get_running_loop()
        if self.draining or not self.alive:
            raise ApiError(503, "The server is stopping." if self.draining else "The engine has stopped.")
        if self._live + work.samples > self._most:
            raise ApiError(
                429,
                f"{self._live} replies are in work or waiting, and {work.samples} more would exceed {self._most}; "
                "try again later.",
            )
        self._open.add(work)
        timer = loop.call_later(seconds, work.cancel)
        try:
            self.tell(_Submit(work))
            if not self.alive:
                raise ApiError(503, "The engine has stopped.")
            yield work
        finally:
            timer.cancel()
            if work.left:
                work.cancel()
            self._open.remove(work)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self._ended = True  # before the last look: who sends later sees it
            self._stop(error := ApiError(503, "The server is stopping."))
            while not self._inbox.empty():
                if isinstance(message := self._inbox.get(), _Submit):
                    self._call(message.work.put, Failed(error))

    def _serve(self) -> None:
        while True:
            try:
                if self._work():
                    return
                continue
            except Exception:
                log.error("a step of the engine failed; its requests end\n%s", traceback.format_exc())
                self.failures += 1
                self._stop(ApiError(500, "The engine failed while it was working on this; try again."))
                self._before, self._engine = self.counts, None
            # Only out here the failed engine is gone, whose memory the next one needs: what was raised holds it.
            try:
                self._engine = self._make()
            except Exception:
                log.error("no new engine can be made\n%s", traceback.format_exc())
                return

    def _work(self) -> bool:
        """Does what there is to do. True: close."""
        engine = self._engine
        assert engine is not None
        if self._read(engine):
            return True
        if engine.busy:
            self._deliver(engine.step())
        return False

    def _read(self, engine: Engine) -> bool:
        """Takes in what was sent; waits for it where there is nothing else to do. True: close.

        Requests that come together begin together: who is late by a moment would wait for a whole step.
        """
        if not engine.busy:
            if self._take(engine, self._inbox.get()):
                return True
            seen, until = -1, time.monotonic() + TOGETHER
            while engine.busy and self._inbox.qsize() > seen and time.monotonic() < until:
                seen = self._inbox.qsize()
                time.sleep(QUIET)
                for _ in range(TURNS):
                    self._call((turned := threading.Event()).set)
                    turned.wait(TOGETHER)
        return any(self._take(engine, self._inbox.get()) for _ in range(self._inbox.qsize()))

    def _take(self, engine: Engine, message: _Submit | _Cancel | _Close) -> bool:
        """Does what a message says. True: close."""
        if isinstance(message, _Submit):
            self._submit(engine, message)
        elif isinstance(message, _Cancel):
            for ticket, place in self._places.items():
                if place.work is message.work and message.number in (None, place.number):
                    engine.cancel(ticket, message.sample)
        return isinstance(message, _Close)

    def _submit(self, engine: Engine, message: _Submit) -> None:
        tickets: list[Ticket] = []
        try:
            for number, request in enumerate(message.work.requests):
                tickets.append(ticket := engine.submit(request))
                self._places[ticket] = _Place(message.work, number, request.samples)
        except Exception as error:
            for ticket in tickets:
                del self._places[ticket]
                engine.cancel(ticket)
            if isinstance(error, UserError):
                told = ApiError(400, str(error))
            else:
                log.error("the engine failed to take a request in\n%s", traceback.format_exc())
                told = ApiError(500, "The engine failed to take this in; the server's log says why.")
            self._call(message.work.put, Failed(told))

    def _deliver(self, events: Sequence[Event]) -> None:
        found: dict[Work, list[tuple[int, Event]]] = {}
        for event in events:
            place = self._places.get(event.ticket)
            if place is None:  # refused together with another one
                continue
            found.setdefault(place.work, []).append((place.number, event))
            place.left -= isinstance(event, Finished)
            if not place.left:
                del self._places[event.ticket]
        if found:  # all in one call: each wakes the loop's thread, which then takes the interpreter from this one
            self._call(_put, list(found.items()))

    def _stop(self, error: ApiError) -> None:
        for work in {place.work for place in self._places.values()}:
            self._call(work.put, Failed(error))
        self._places.clear()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)


def _put(told: list[tuple[Work, list[tuple[int, Event]]]]) -> None:
    for work, events in told:
        work.put(events)
