"""One sample of one request on its way through the engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, UInt8, UInt32

from m1jax.inference.prefixes import Node
from m1jax.inference.stopping import Thought
from m1jax.inference.types import Completion, Finish, Request, Ticket


class Sequence:
    """Its tokens, what was recorded of them, and where its memory lies.

    Its last token has never been through the model: a decode step feeds it and draws the next one. So a prompt's
    prefill needs no head, a kept prefix serves every continuation, and a sequence goes on from a fork, a hit or a
    preemption as from a prompt.

    Args:
        order: of arrival; the older goes first.
        key: the raw key of the request.
        further: numbers for samples beyond the request's own, shared by all that descend from it.
    """

    def __init__(
        self,
        order: int,
        ticket: Ticket,
        sample: int,
        request: Request,
        key: UInt32[np.ndarray, " words"],
        further: Iterator[int],
    ) -> None:
        self.order, self.ticket, self.sample, self.request = order, ticket, sample, request
        self.key, self.further = key, further
        self.prompt = len(request.tokens)
        self.tokens: list[int] = np.asarray(request.tokens).tolist()
        self.logp: list[float] = []
        self.nucleus_logp: list[float] = []
        self.written: list[bool] = []
        self.version: list[int] = []
        self.routes: list[UInt8[np.ndarray, "n layers k"]] = []
        """of the computed tokens, in pieces"""
        self.certain = 0
        """tokens in a row that count as repetition, so far"""
        budget = request.sampling.thinking_budget
        self.thought = None if budget is None else Thought(budget, self.tokens)
        self.matcher = None if request.constraint is None else request.constraint.begin()
        self.shown = 0
        """tokens beyond the prompt that the matcher knows, some of which may still be on their way"""

        self.computed = 0
        """tokens that states and keys have seen"""
        self.row = -1
        """its row of the batch; -1 while it waits"""
        self.slot = -1
        """of its states"""
        self.pages: list[int] = []
        self.junctions: dict[int, Node] = {}
        """lengths at which it has promised to leave a snapshot, and the nodes for them"""
        self.waits_for: Node | None = None
        """somebody else's promise, worth waiting for"""
        self.stale = False
        """older weights than today's have a part in its states: nobody else may have them"""

    @property
    def new(self) -> int:
        """Tokens beyond the prompt."""
        return len(self.tokens) - self.prompt

    @property
    def pending(self) -> int:
        """Tokens to prefill before the next can be drawn."""
        return len(self.tokens) - 1 - self.computed

    def allowance(self, steps: int) -> int:
        """How many tokens the next `steps` decode steps may write before somebody must look."""
        left = self.left
        if self.thought is not None and self.thought.left is not None:
            left = min(left, self.thought.left)
        return min(steps, left)

    @property
    def left(self) -> int:
        """Tokens that it may still write."""
        return self.request.sampling.max_new_tokens - self.new

    def known(self) -> Int32[np.ndarray, " n"]:
        """The tokens that a snapshot could have seen: all but the last."""
        return np.array(self.tokens[:-1], np.int32)

    def extend(
        self, tokens: list[int], logp: list[float], nucleus_logp: list[float], *, version: int, written: bool
    ) -> None:
        self.tokens += tokens
        self.logp += logp
        self.nucleus_logp += nucleus_logp
        self.written += [written] * len(tokens)
        self.version += [version] * len(tokens)
        if self.thought is not None:
            self.thought.feed(tokens)
        if self.matcher is not None and self.shown < self.new:
            self.matcher.take(self.tokens[self.prompt + self.shown :])
            self.shown = self.new

    def show(self, token: int) -> None:
        """Let the matcher see a token that is still being written."""
        assert self.matcher is not None
        self.matcher.take([token])
        self.shown += 1

    def allowed(self) -> UInt32[np.ndarray, " words"]:
        """What the matcher lets it write after what it was shown."""
        assert self.matcher is not None
        return self.matcher.allowed(self.request.sampling.max_new_tokens - self.shown)

    def forced(self) -> list[int]:
        """What must be written now in the model's place: the end of a thought that has taken all it may."""
        budget = self.request.sampling.thinking_budget
        if budget is None or self.thought is None or self.thought.left != 0:
            return []
        return list(budget.close)[: self.left]

    def fork(self, order: int, ticket: Ticket) -> Sequence:
        """Another sample with the same tokens so far, and randomness of its own from here on."""
        child = Sequence(order, ticket, next(self.further), self.request, self.key, self.further)
        if child.thought is not None:
            child.thought.feed(self.tokens[self.prompt :])
        if child.matcher is not None:
            child.matcher.take(self.tokens[self.prompt :])
            child.shown = self.new
        child.tokens, child.logp, child.nucleus_logp = self.tokens.copy(), self.logp.copy(), self.nucleus_logp.copy()
        child.written, child.version, child.certain = self.written.copy(), self.version.copy(), self.certain
        return child

    def completion(self, finish: Finish) -> Completion:
        return Completion(
            np.array(self.tokens[self.prompt :], np.int32),
            np.array(self.logp, np.float32),
            np.array(self.nucleus_logp, np.float32),
            np.array(self.written, bool),
            np.array(self.version, np.int32),
            np.concatenate(self.routes) if self.routes and self.request.record_routes else None,
            finish,
            self.sample,
        )
