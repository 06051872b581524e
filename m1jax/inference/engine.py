"""One engine for chat, agents and rollouts: requests come and go, and every step serves all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Several
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jaxtyping import UInt8

from m1jax.errors import UserError
from m1jax.inference.capacity import Capacity
from m1jax.inference.checks import check_request
from m1jax.inference.scheduler import Chunk, Copy, Counts, Scheduler
from m1jax.inference.sequence import Sequence
from m1jax.inference.stopping import REASONS
from m1jax.inference.types import Completion, Event, Finish, Finished, Request, Ticket, Wrote

A = TypeVar("A", np.ndarray, jax.Array)


class Decoded(NamedTuple, Generic[A]):
    """What decode steps wrote, one row for each sequence; beyond its count a row means nothing."""

    counts: A
    """int32 [n]"""
    tokens: A
    """int32 [n, steps]"""
    logp: A
    """float32 [n, steps]"""
    nucleus_logp: A
    """float32 [n, steps]"""
    reasons: A
    """int32 [n], places in `stopping.REASONS`"""
    certain: A
    """int32 [n], `Sequence.certain` from now on"""
    routes: A | None
    """uint8 [n, steps, layers, k]"""


class Runner(Protocol):
    """The model on its device. Rows and slots, pages and lengths are the sequences' own."""

    capacity: Capacity
    vocab_size: int
    records_routes: bool

    def copy(self, copies: Several[Copy]) -> None:
        """Copy states and pages, one after the other."""
        ...

    def prefill(self, shape: tuple[int, int], chunks: Several[Chunk]) -> list[UInt8[np.ndarray, "n layers k"]]:
        """Let the model read the chunks' tokens. Returns their routes, where they are recorded."""
        ...

    def decode(self, sequences: Several[Sequence], allowances: Several[int]) -> Decoded[np.ndarray]:
        """Feed each sequence its last token and draw the next, up to so many times."""
        ...

    def load(self, params: object) -> None:
        """Take other weights."""
        ...


class Engine:
    """Continuous batching for a hybrid model. Not safe to be used by several threads at once.

    Args:
        runner: the model on its device (`m1jax.inference.ModelRunner`).
        version: of the weights that the runner begins with.

    Attributes:
        counts: what was done so far.
    """

    def __init__(self, runner: Runner, version: int = 0) -> None:
        self._runner, self._version = runner, version
        self._scheduler = Scheduler(runner.capacity)
        self._live: dict[Ticket, dict[int, Sequence]] = {}
        self._tickets = self._arrivals = 0
        self._events: list[Event] = []

    @property
    def counts(self) -> Counts:
        return self._scheduler.counts

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._live or self._events)

    def submit(self, request: Request) -> Ticket:
        """Take a request in. Its samples run as soon as there is room for them.

        Raises:
            UserError: the request cannot be served by this model or in this engine's memory; nothing was taken in.
        """
        check_request(request, self._runner.capacity, self._runner.vocab_size, self._runner.records_routes)
        key = np.asarray(jax.random.key_data(request.key))
        ticket, further = self._new_ticket(), itertools.count(request.samples)
        for sample in range(request.samples):
            self._add(Sequence(self._arrivals, ticket, sample, request, key, further))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request's samples where they are; `step` tells of it. One that has ended already is left alone."""
        for sequence in list(self._live.get(ticket, {}).values()):
            self._end(sequence, "cancelled")

    def fork(self, ticket: Ticket, n: int, sample: int = 0) -> list[Ticket]:
        """n more requests that go on from where this sample of a request is now, each with randomness of its own.

        Their completions hold what the sample had written so far, too. Fork number f of a request with G samples draws
        its tokens as sample G + f would.

        Raises:
            UserError: the sample has ended, or was never asked for, or n is not positive.
        """
        source = self._live.get(ticket, {}).get(sample)
        if source is None:
            raise UserError(f"fork: sample {sample} of request {ticket.number} is not running; fork it before it ends")
        if n < 1:
            raise UserError(f"fork: n = {n} must be at least 1")
        if source.row >= 0:
            self._scheduler.snapshot(source)
        tickets = [self._new_ticket() for _ in range(n)]
        for fork in tickets:
            self._add(source.fork(self._arrivals, fork))
        return tickets

    def load(self, params: object, version: int) -> None:
        """Go on with other weights. A sample that has written nothing yet is computed by them alone; one that has keeps
        its states and keys, and its completion says which weights wrote which token. Kept prefixes are forgotten."""
        self._runner.load(params)
        self._version = version
        self._scheduler.forget()

    def step(self) -> list[Event]:
        """Run what is to be run next (a piece of prefill, some decode steps) and tell what came of it."""
        plan = self._scheduler.plan()
        self._copy()
        if plan.chunks:
            routes = self._runner.prefill(plan.shape, plan.chunks)
            for chunk, found in zip(plan.chunks, routes):
                chunk.sequence.routes.append(found)
            for chunk in plan.chunks:
                self._scheduler.advanced(chunk.sequence, chunk.count)
                self._scheduler.counts.prefilled += chunk.count
            self._copy()
        if plan.decode:
            allowances = [s.allowance(self._runner.capacity.steps) for s in plan.decode]
            self._take(plan.decode, self._runner.decode(plan.decode, allowances))
        events, self._events = self._events, []
        return events

    def run(self, requests: Several[Request]) -> Iterator[tuple[int, Completion]]:
        """Serve these requests: (number of the request, completion), as they end. Others are served meanwhile, and
        `step` tells of them later."""
        numbers = {self.submit(request): number for number, request in enumerate(requests)}
        others: list[Event] = []
        left = sum(request.samples for request in requests)
        try:
            while left:
                for event in self.step():
                    if event.ticket not in numbers:
                        others.append(event)
                    elif isinstance(event, Finished):
                        left -= 1
                        yield numbers[event.ticket], event.completion
        finally:  # the caller may have gone away
            for ticket in numbers:
                self.cancel(ticket)
            self._events = others + [event for event in self._events if event.ticket not in numbers]

    def _new_ticket(self) -> Ticket:
        ticket = Ticket(self._tickets)
        self._tickets += 1
        self._live[ticket] = {}
        return ticket

    def _add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        self._live[sequence.ticket][sequence.sample] = sequence
        self._scheduler.submit(sequence)

    def _take(self, sequences: list[Sequence], out: Decoded[np.ndarray]) -> None:
        """What the runner decoded becomes part of its sequences."""
        tokens, logp, nucleus_logp = out.tokens.tolist(), out.logp.tolist(), out.nucleus_logp.tolist()
        for i, sequence in enumerate(sequences):
            count, finish = int(out.counts[i]), REASONS[out.reasons[i]]
            if out.routes is not None:
                sequence.routes.append(out.routes[i, :count])
            self._scheduler.advanced(sequence, count)
            sequence.certain = int(out.certain[i])
            if finish == "fault":  # its last token was drawn from what are no numbers
                count -= 1
            self._extend(sequence, tokens[i][:count], logp[i][:count], nucleus_logp[i][:count], written=True)
            if finish is None and (forced := sequence.forced()):
                zeros = [0.0] * len(forced)
                self._extend(sequence, forced, zeros, zeros, written=False)
            if finish is None and sequence.new >= sequence.request.sampling.max_new_tokens:
                finish = "length"
            if finish is not None:
                self._end(sequence, finish)

    def _copy(self) -> None:
        if copies := self._scheduler.copies():
            self._runner.copy(copies)

    def _extend(
        self, sequence: Sequence, tokens: list[int], logp: list[float], nucleus_logp: list[float], *, written: bool
    ) -> None:
        sequence.extend(tokens, logp, nucleus_logp, version=self._version, written=written)
        if tokens:
            self._events.append(Wrote(sequence.ticket, sequence.sample, tuple(tokens), tuple(logp)))

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        self._events.append(Finished(sequence.ticket, sequence.sample, sequence.completion(finish)))
        if finish in ("cancelled", "fault"):
            self._scheduler.cancel(sequence)
        else:
            self._scheduler.finish(sequence)
        live = self._live[sequence.ticket]
        del live[sequence.sample]
        if not live:
            del self._live[sequence.ticket]
