"""Who runs next: admission, chunks of prompts between decode steps, preemption. Knows neither model nor device.

Oldest first, always: a sequence that was preempted comes before all younger ones, so the oldest gets done whatever
happens, and everybody becomes the oldest.
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np
from jaxtyping import Int32

from m1jax.inference.capacity import Capacity
from m1jax.inference.pool import Pool
from m1jax.inference.prefixes import Node, Prefixes
from m1jax.inference.sequence import Sequence

WORTH = 16
"""Tokens that a prefix found by chance must spare its followers."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """States to be copied from a slot to another, and one page likewise. Copies are carried out in their order."""

    slot_from: int
    """-1: zeros"""
    slot_to: int
    page_from: int = -1
    """-1: no page"""
    page_to: int = -1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The next tokens of a sequence to be prefilled."""

    sequence: Sequence
    count: int


@dataclasses.dataclass
class Counts:
    """What was done so far."""

    prefilled: int = 0
    """tokens"""
    reused: int = 0
    """tokens that a kept prefix spared"""
    preempted: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


class Scheduler:
    """Keeps the books of rows, pages and prefixes.

    `chunks` and `decoding` say what to run; `advanced` and `finish` are told what has been run; after each of them
    `copies` says what must be copied before anything else runs. A sequence in `running` has a row, with a slot for its
    states, and pages for what it will compute next.

    Args:
        capacity: of every part.
        part: whose books these are; its places are numbered behind those of the parts before it.
    """

    def __init__(self, capacity: Capacity, part: int = 0) -> None:
        self.capacity = capacity
        self.rows = _of_part(part, capacity.rows)
        self.pages = _of_part(part, capacity.pages)
        self._first_slot = part * capacity.slots
        slots = range(self._first_slot + capacity.rows, self._first_slot + capacity.slots)
        self.prefixes = Prefixes(self.pages, slots)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.counts = Counts()
        self._copies: list[Copy] = []
        self._idle = 0
        """rows x steps that were free while somebody waited, since somebody was let in"""

    def submit(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def cancel(self, sequence: Sequence) -> None:
        if sequence.row < 0:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)

    @property
    def load(self) -> int:
        """Sequences that are here."""
        return len(self.waiting) + len(self.running)

    def admit(self, *, sends_away: bool = True) -> None:
        """Make room for what the running will write, whoever must go for it, and let those who wait in where there is
        room for them."""
        if sends_away:
            self._grow()
        if self._gathers():
            return
        self._admit()
        self._idle = 0

    def _gathers(self) -> bool:
        """Whether those who wait had better be joined by others before they are let in. On a device that starts work
        ahead, reading a prompt costs about a decode step of everybody, and reading several hardly more: it is done
        once as much has been lost by leaving rows free."""
        if not (self.capacity.ahead and self.waiting and self.running):
            return False
        self._idle += self.rows.free * self.capacity.steps
        return self._idle < len(self.running)

    def go_on(self, steps: int) -> bool:
        """Whether those who run can write for so many decode steps more with nobody sent away; room for that is
        made."""
        return all(self._extend(s, steps) for s in self.running)

    def chunks(self, shape: tuple[int, int]) -> list[Chunk]:
        """What a prefill program would have to do."""
        rows, most = shape
        pending = [s for s in self.running if s.pending][:rows]
        return [Chunk(s, min(most, min([*s.junctions, s.computed + s.pending]) - s.computed)) for s in pending]

    def decoding(self) -> list[Sequence]:
        """Who can decode."""
        return [s for s in self.running if not s.pending]

    def copies(self) -> list[Copy]:
        """Those that have become due; they are told once."""
        copies, self._copies = self._copies, []
        return copies

    def advanced(self, sequence: Sequence, count: int) -> None:
        """So many more tokens of a sequence have gone through the model."""
        sequence.computed += count
        if node := sequence.junctions.pop(sequence.computed, None):
            self._keep(sequence, node)

    def finish(self, sequence: Sequence) -> None:
        """A running sequence has ended."""
        if sequence.request.keep:
            self.snapshot(sequence)
        self._release(sequence)

    def snapshot(self, sequence: Sequence) -> None:
        """Keep what a running sequence has computed, where it can be kept."""
        if not sequence.stale and (node := self.prefixes.promise(sequence.known()[: sequence.computed])):
            self._keep(sequence, node)

    def forget(self) -> None:
        """The weights have changed: nothing kept is of use, and who has not begun to write starts afresh."""
        for sequence in reversed(self.running.copy()):
            self._withdraw(sequence)
            sequence.stale = True
            if not sequence.new:
                self._preempt(sequence)
        self.prefixes.clear()

    def _grow(self) -> None:
        """Pages for what the running will write; where there are none, the youngest must go."""
        for sequence in self.running.copy():
            while sequence.row >= 0 and not self._extend(sequence, self.capacity.steps):  # it may have been preempted
                self._preempt(self.running[-1])

    def _extend(self, sequence: Sequence, steps: int) -> bool:
        """Pages for what a running sequence may write in so many decode steps; False: there are none."""
        # Most have enough, whatever they are allowed.
        if len(sequence.tokens) - 1 + steps <= len(sequence.pages) * self.capacity.page_size:
            return True
        need = max(0, self._pages_ahead(sequence, steps) - len(sequence.pages))
        if not self._make_room(need):
            return False
        sequence.pages += self.pages.take(need)
        return True

    def _pages_ahead(self, sequence: Sequence, steps: int) -> int:
        """Pages for its tokens and those that so many decode steps may write."""
        return self.capacity.pages_for(len(sequence.tokens) - 1 + sequence.allowance(steps))

    def _make_room(self, need: int, spare: int = 0) -> bool:
        """Whether so many pages are free, or could be made so by forgetting prefixes, which is then done."""
        if self.pages.free >= need + spare:
            return True
        if self.pages.free + self.prefixes.reclaimable() < need + spare:
            return False
        while self.pages.free < need:
            self.prefixes.evict()
        return True

    def _admit(self) -> None:
        held = 0  # who waits for a prefix has its row already: a group stays together
        for sequence in self.waiting.copy():
            if self.rows.free <= held:
                break
            waits = sequence.waits_for is not None and sequence.waits_for.promised
            if not waits and not self._place(sequence):
                break  # nobody overtakes: pages will be free for it some day
            held += sequence.row < 0

    def _place(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its row, or let it wait for a prefix in the making. False: there are no pages."""
        tokens = sequence.known()
        path, known = self.prefixes.find(tokens)
        hit = next((node for node in reversed(path) if node.snapshot is not None), self.prefixes.root)
        promised = next((node for node in reversed(path) if node.promised), None)
        if promised is not None and promised.depth > hit.depth:
            sequence.waits_for = promised
            return True
        parting = known if known - hit.depth >= WORTH else None
        if parting is not None and (node := self._ask(tokens[:parting])):
            sequence.waits_for = node
            return True

        snapshot = hit.snapshot
        whole, part = divmod(hit.depth, self.capacity.page_size)
        shared = () if snapshot is None else snapshot.pages[:whole]
        self.pages.share(shared)
        need = self._pages_ahead(sequence, self.capacity.steps) - whole
        if not self._make_room(need, spare=len(self.running)):
            self.pages.release(shared)
            return False

        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        (sequence.row,) = self.rows.take(1)
        sequence.slot = self._first_slot + sequence.row - self.rows.numbers.start  # rows' slots come first
        own = self.pages.take(need)
        sequence.pages = [*shared, *own]
        sequence.computed = hit.depth
        sequence.waits_for, sequence.stale = None, False
        if snapshot is None:
            self._copies.append(Copy(-1, sequence.slot))
        else:
            # Its last page is partly full, and others may go on from it too.
            page = (snapshot.pages[whole], own[0]) if part else (-1, -1)
            self._copies.append(Copy(snapshot.slot, sequence.slot, *page))
            sequence.routes = list(snapshot.routes)
            self.prefixes.touch(hit)
        self.counts.reused += hit.depth
        for length in {*sequence.request.junctions, sequence.prompt - 1, parting or 0}:
            if hit.depth < length <= len(tokens) and (node := self.prefixes.promise(tokens[:length])):
                sequence.junctions[length] = node
        return True

    def _ask(self, tokens: Int32[np.ndarray, " n"]) -> Node | None:
        """The promise of a snapshot after these tokens, from somebody who is on the way there."""
        for other in self.running:
            ahead = other.computed < len(tokens) <= other.computed + other.pending
            if ahead and not other.stale and np.array_equal(other.known()[: len(tokens)], tokens):
                node = self.prefixes.promise(tokens)
                if node is not None:
                    other.junctions[len(tokens)] = node
                return node
        return None

    def _keep(self, sequence: Sequence, node: Node) -> None:
        pages = sequence.pages[: self.capacity.pages_for(sequence.computed)]
        slot = self.prefixes.keep(node, pages, sequence.routes)
        if slot is not None:
            self._copies.append(Copy(sequence.slot, slot))

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything away from a running sequence; it will be computed again."""
        self._release(sequence)
        self.submit(sequence)
        self.counts.preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self._withdraw(sequence)
        self.running.remove(sequence)
        self.rows.release([sequence.row])
        self.pages.release(sequence.pages)
        sequence.row, sequence.slot, sequence.pages, sequence.computed, sequence.routes = -1, -1, [], 0, []

    def _withdraw(self, sequence: Sequence) -> None:
        for node in sequence.junctions.values():
            self.prefixes.withdraw(node)
        sequence.junctions = {}


def _of_part(part: int, count: int) -> Pool:
    return Pool(range(part * count, (part + 1) * count))
