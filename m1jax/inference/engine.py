"""One engine for chat, agents and rollouts: requests come and go, and every step serves all of them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from collections.abc import Sequence as Several
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from m1jax.errors import UserError
from m1jax.inference.capacity import Capacity
from m1jax.inference.checks import check_request
from m1jax.inference.device import Call, Decoded, Runner
from m1jax.inference.memory import capacity_for
from m1jax.inference.runner import ModelRunner
from m1jax.inference.scheduler import Counts, Scheduler
from m1jax.inference.sequence import Sequence
from m1jax.inference.stopping import REASONS
from m1jax.inference.types import Completion, Event, Finish, Finished, Loaded, Request, Ticket, Wrote
from m1jax.model import MiniMaxM1

FIXED = 256
"""What a prefill costs besides its tokens (reading the weights, starting), in tokens."""
PATIENCE = 4
"""Tokens that may be prefilled for each one that is decoded, which takes about as long."""

FEW = 8
"""One in so many that write may be made to wait for its first token until all have written theirs."""


class Engine:
    """Continuous batching for a hybrid model. Not safe to be used by several threads at once.

    Args:
        runner: the model on its device (`m1jax.inference.ModelRunner`).
        version: of the weights that the runner begins with.

    """

    @classmethod
    def of(
        cls,
        model: MiniMaxM1,
        *,
        rows: int | None = None,
        max_length: int | None = None,
        memory: int | None = None,
        record_routes: bool = False,
        top: int = 0,
        constrains: bool = False,
    ) -> Engine:
        """An engine for a model, as large as the device allows; sizes as in `memory.capacity_for`, the rest as in
        `ModelRunner`.

        Raises:
            UserError: not even one sequence of that length fits.
        """
        capacity = capacity_for(model.config, model.dtype, rows=rows, max_length=max_length, memory=memory)
        graph, params = nnx.split(model)
        return cls(ModelRunner(graph, params, capacity, record_routes=record_routes, top=top, constrains=constrains))

    def __init__(self, runner: Runner, version: int = 0) -> None:
        self._runner, self._version = runner, version
        self._parts = [Scheduler(runner.capacity, part) for part in range(runner.capacity.parts)]
        self._live: dict[Ticket, dict[int, Sequence]] = {}
        self._home: dict[Sequence, Scheduler] = {}
        self._tickets = self._arrivals = 0
        self._events: list[Event] = []
        self._flight: _Flight | None = None

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return sum((part.counts for part in self._parts), Counts())

    @property
    def capacity(self) -> Capacity:
        """How much it holds."""
        return self._runner.capacity

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._live or self._events)

    def submit(self, request: Request) -> Ticket:
        """Take a request in. Its samples run as soon as there is room for them.

        Raises:
            UserError: the request cannot be served by this model or in this engine's memory.
            Exception: whatever its constraint raises. In either case nothing was taken in.
        """
        check_request(request, self._runner)
        key = np.asarray(jax.random.key_data(request.key))
        ticket, further = Ticket(self._tickets), itertools.count(request.samples)
        prompt = np.asarray(request.tokens, np.int32)
        sequences = [
            Sequence(self._arrivals + sample, ticket, sample, request, key, further)
            for sample in range(request.samples)
        ]
        part = self._parts[0]
        if len(self._parts) > 1:
            part = min(self._parts, key=lambda part: (part.load, -part.prefixes.kept(prompt)))
        self._new_ticket()
        for sequence in sequences:
            self._add(sequence, part)
        return ticket

    def cancel(self, ticket: Ticket, sample: int | None = None) -> None:
        """End a request's samples, or one of them, where they are; `step` tells of it. One that has ended already is
        left alone."""
        for sequence in list(self._live.get(ticket, {}).values()):
            if sample is None or sequence.sample == sample:
                self._end(sequence, "cancelled")

    def fork(self, ticket: Ticket, n: int, sample: int = 0) -> list[Ticket]:
        """n more requests that go on from where this sample of a request is now, each with randomness of its own.

        Their completions hold what the sample had written so far, too. Fork number f of a request with G samples draws
        its tokens as sample G + f would.

        Raises:
            UserError: the sample has ended, or was never asked for, or n is not positive.
        """
        self._land()
        source = self._live.get(ticket, {}).get(sample)
        if source is None:
            raise UserError(f"fork: sample {sample} of request {ticket.number} is not running; fork it before it ends")
        if n < 1:
            raise UserError(f"fork: n = {n} must be at least 1")
        if source.row >= 0:
            self._home[source].snapshot(source)
        tickets = [self._new_ticket() for _ in range(n)]
        for fork in tickets:
            self._add(source.fork(self._arrivals, fork), self._home[source])
        return tickets

    def load(self, params: nnx.State, version: int) -> Loaded:
        """Go on with other weights. A sample that has written nothing yet is computed by them alone; one that has keeps
        its states and keys, and its completion says which weights wrote which token. Kept prefixes are forgotten."""
        self._land()
        begin = time.perf_counter()
        received = self._runner.load(params)
        self._version = version
        for part in self._parts:
            part.forget()
        return Loaded(version, received, time.perf_counter() - begin)

    def rest(self) -> None:
        """Give the device's memory back, weights and all, until `load`. Nobody may be in work."""
        assert not self._live, "requests are in work"
        self._land()
        for part in self._parts:
            part.forget()
        self._runner.rest()

    def step(self) -> list[Event]:
        """Run what is to be run next (a piece of prefill, some decode steps) and tell what came of it."""
        for part in self._parts:
            part.admit(sends_away=self._flight is None)
        self._prefill()
        if self._flight is not None and not self._goes_on(self._flight):
            self._land()
        flight = self._flight
        self._flight = self._decode(self._decoding, flight)
        if flight is not None:
            self._take(flight.sequences, flight.call.result())
        if self._flight is not None and not self._may_follow(self._flight):
            self._land()
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

    def _add(self, sequence: Sequence, part: Scheduler) -> None:
        self._arrivals += 1
        self._live[sequence.ticket][sequence.sample] = sequence
        self._home[sequence] = part
        part.submit(sequence)

    def _prefill(self) -> None:
        """Read prompts, so many of their tokens that those who decode need not wait too long."""
        self._copy()
        capacity, running = self._runner.capacity, [s for part in self._parts for s in part.running]
        if not any(sequence.pending for sequence in running):
            return
        left = max(FIXED + capacity.stall, PATIENCE * capacity.steps * len(running) // capacity.parts)
        if all(sequence.pending for sequence in running):  # nobody waits
            left = max(left, FIXED + math.prod(capacity.prefill[-1]))
        while shape := self._prefill_shape(left):
            chunks = [chunk for part in self._parts for chunk in part.chunks(shape)]
            for chunk, routes in zip(chunks, self._runner.prefill(shape, chunks)):
                chunk.sequence.routes.append(routes)
            for chunk in chunks:
                self._home[chunk.sequence].advanced(chunk.sequence, chunk.count)
                self._home[chunk.sequence].counts.prefilled += chunk.count
            self._copy()
            left -= FIXED + math.prod(shape)

    def _prefill_shape(self, most: int) -> tuple[int, int] | None:
        """The prefill program that does the most for its cost, of those that cost no more; None: there is none, or
        nothing to do."""

        def rate(shape: tuple[int, int]) -> float:
            tokens = sum(chunk.count for part in self._parts for chunk in part.chunks(shape))
            return tokens / (FIXED + math.prod(shape))

        shapes = [shape for shape in self._runner.capacity.prefill if FIXED + math.prod(shape) <= most]
        best = max(shapes, key=rate, default=None)
        return best if best is not None and rate(best) else None

    def _may_follow(self, flight: _Flight) -> bool:
        """Whether a call may be started after one whose result nobody has seen."""
        capacity = self._runner.capacity
        if not (capacity.ahead and self._live):
            return False
        # The host is held up by a first token's call, and by those that tell the likeliest, until they end; by those
        # for which it looks something up where they do not ask for it by themselves.
        guides = self._runner.guides_ahead
        if flight.steps < capacity.steps or any(
            s.request.top or (s.matcher is not None and not guides) for s in self._home
        ):
            return False
        return all(part.go_on(flight.steps + capacity.steps) for part in self._parts)

    @property
    def _decoding(self) -> list[Sequence]:
        return [s for part in self._parts for s in part.decoding()]

    def _goes_on(self, flight: _Flight) -> bool:
        """Whether the next call can begin where this one will end; with constrained rows it can if nobody is new."""
        constrained = any(s.matcher is not None for s in self._decoding)
        return not constrained or set(self._decoding) <= set(flight.sequences)

    def _decode(self, sequences: list[Sequence], flight: _Flight | None) -> _Flight | None:
        """Start the next decode steps, `flight` being on its way."""
        before = dict.fromkeys(flight.sequences, flight.steps) if flight is not None else {}
        sequences = [s for s in sequences if s.left > before.get(s, 0)]
        if not sequences:
            return None
        self._copy()
        # First tokens are told at once, unless most have theirs and would wait for few.
        fresh = sum(not s.new and s not in before for s in sequences)
        capacity = self._runner.capacity
        steps = 1 if fresh * FEW > len(sequences) else capacity.steps
        allowances = [s.allowance(before.get(s, 0) + steps) for s in sequences]
        # Rows that fall idle are worth a look only where somebody waits for them.
        waiting = any(part.waiting for part in self._parts)
        patience = max(1, len(allowances) // 8) if waiting else len(allowances)
        after = None if flight is None else flight.call
        return _Flight(sequences, steps, self._runner.decode(sequences, allowances, steps, patience, after))

    def _land(self) -> None:
        """Nothing is on its way any more."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._take(flight.sequences, flight.call.result())

    def _take(self, sequences: list[Sequence], out: Decoded[np.ndarray]) -> None:
        """What the runner decoded becomes part of its sequences."""
        tokens, logp, nucleus_logp = out.tokens.tolist(), out.logp.tolist(), out.nucleus_logp.tolist()
        written = zip(sequences, out.counts.tolist(), out.reasons.tolist(), out.certain.tolist())
        for i, (sequence, count, reason, certain) in enumerate(written):
            if sequence not in self._home:  # it ended while this was on its way
                continue
            finish = REASONS[reason]
            if out.routes is not None:
                sequence.routes.append(out.routes[i, :count])
            self._home[sequence].advanced(sequence, count)
            sequence.certain = certain
            if finish == "fault":  # its last token was drawn from what are no numbers
                count -= 1
            top = _top(sequence.request.top, out, i, count)
            self._extend(sequence, tokens[i][:count], logp[i][:count], nucleus_logp[i][:count], top, written=True)
            if finish is None and (forced := sequence.forced()):
                zeros = [0.0] * len(forced)
                top = tuple(() for _ in forced) if sequence.request.top else ()
                self._extend(sequence, forced, zeros, zeros, top, written=False)
            if finish is None and sequence.new >= sequence.request.sampling.max_new_tokens:
                finish = "length"
            if finish is not None:
                self._end(sequence, finish)

    def _copy(self) -> None:
        if copies := [copy for part in self._parts for copy in part.copies()]:
            self._runner.copy(copies)

    def _extend(
        self,
        sequence: Sequence,
        tokens: list[int],
        logp: list[float],
        nucleus_logp: list[float],
        top: tuple[tuple[tuple[int, float], ...], ...],
        *,
        written: bool,
    ) -> None:
        sequence.extend(tokens, logp, nucleus_logp, version=self._version, written=written)
        if tokens:
            self._events.append(Wrote(sequence.ticket, sequence.sample, tuple(tokens), tuple(logp), top))

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        self._events.append(Finished(sequence.ticket, sequence.sample, sequence.completion(finish)))
        home = self._home.pop(sequence)
        if finish in ("cancelled", "fault"):
            home.cancel(sequence)
        else:
            home.finish(sequence)
        live = self._live[sequence.ticket]
        del live[sequence.sample]
        if not live:
            del self._live[sequence.ticket]


class _Flight(NamedTuple):
    """A decode call on its way."""

    sequences: list[Sequence]
    steps: int
    """that it has at most"""
    call: Call


def _top(asked: int, out: Decoded[np.ndarray], row: int, count: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The likeliest tokens in the places of those that a row has written."""
    if not asked or out.top_tokens is None or out.top_logp is None:
        return ()
    tokens, logp = (x[row, :count, :asked].tolist() for x in (out.top_tokens, out.top_logp))
    return tuple(tuple(zip(*pair)) for pair in zip(tokens, logp))
