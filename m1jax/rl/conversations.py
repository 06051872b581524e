"""Many conversations of the policy with environments at once: whoever has been answered goes on."""

import asyncio
import collections
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import jax

from m1jax.errors import UserError
from m1jax.inference.types import Completion, Request, Ticket
from m1jax.rl.attempt import Attempt
from m1jax.rl.environment import Answer, Step
from m1jax.rl.generator import Generator


def converse(
    attempts: Sequence[Attempt],
    generator: Generator,
    *,
    ask: Callable[[Attempt], Request],
    spoke: Callable[[Attempt, Completion], Answer | Awaitable[Answer]],
    heard: Callable[[Attempt, Answer | BaseException], None],
    seconds: float,
) -> None:
    """Lets attempts happen until all have ended.

    As many write at once as the generator has rows. Who waits for a slow environment leaves its row to another, and
    takes the next that becomes free once it has been answered. Without slow ones, the order of everything is fixed.

    Args:
        attempts: in the order in which they begin.
        generator: the policy.
        ask: the request for an attempt's next turn.
        spoke: what an environment answers to a turn, at once or as a coroutine; of no account where the attempt has
            ended with it.
        heard: is told an answer, or what was raised in its place.
        seconds: how long a coroutine may take.
    """
    begin = collections.deque(attempt for attempt in attempts if attempt.ended is None)
    go_on: collections.deque[Attempt] = collections.deque()
    writing: dict[Ticket, Attempt] = {}
    with _Slow(seconds) as slow:
        while begin or go_on or writing or slow.count:
            while (go_on or begin) and len(writing) < generator.rows:
                attempt = (go_on or begin).popleft()
                writing[generator.submit(ask(attempt))] = attempt
            answers: list[tuple[Attempt, Answer | BaseException]] = []
            for ticket, completion in generator.step() if writing else []:
                attempt = writing.pop(ticket)
                answer = spoke(attempt, completion)
                if attempt.ended is not None:
                    continue
                if inspect.isawaitable(answer):
                    slow.wait_for(attempt, answer)
                else:
                    answers.append((attempt, answer))
            for attempt, answer in [*answers, *slow.answered(block=not writing and not go_on and not begin)]:
                heard(attempt, answer)
                if attempt.ended is None:
                    go_on.append(attempt)


def answer_of(attempt: Attempt, answer: Answer) -> Step:
    """An environment's answer as a `Step`; its reward is added to the attempt's."""
    step = Step(*answer)  # pyright: ignore[reportArgumentType] (it may be longer than its type says)
    if step.reward is not None:
        attempt.reward = (attempt.reward or 0.0) + float(step.reward)
    return step


class _Slow:
    """Coroutines, in a thread of their own that begins with the first. A context manager."""

    def __init__(self, seconds: float):
        self.count = 0
        """that have not been told of"""
        self._seconds = seconds
        self._done: queue.SimpleQueue[tuple[Attempt, Future[Answer]]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait_for(self, attempt: Attempt, answer: Awaitable[Answer]) -> None:
        if jax.process_count() > 1:
            raise UserError(
                "an environment that answers by a coroutine needs a single process: when it answers differs"
            )
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="environments", daemon=True)
            self._thread.start()
        self.count += 1
        future = asyncio.run_coroutine_threadsafe(self._limited(answer), self._loop)
        future.add_done_callback(lambda done: self._done.put((attempt, done)))

    async def _limited(self, answer: Awaitable[Answer]) -> Answer:
        try:
            return await asyncio.wait_for(answer, self._seconds)
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {self._seconds:g} seconds") from error

    def answered(self, *, block: bool) -> list[tuple[Attempt, Answer | BaseException]]:
        """Those that have come, at least one where `block` says so and one is to come."""
        found: list[tuple[Attempt, Answer | BaseException]] = []
        while self.count and (not self._done.empty() or (block and not found)):
            attempt, future = self._done.get()
            self.count -= 1
            error = future.exception()
            found.append((attempt, future.result() if error is None else error))
        return found


async def _cancel_all() -> None:
    """Those that nobody waits for any more."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
