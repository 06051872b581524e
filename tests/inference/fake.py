"""A runner without a model: its next token is a hash of all tokens before, read from where they were written.

The hash of a sequence lies in its slot, as a lightning state would, and its tokens lie in its pages, as keys would: any
mix-up of rows, slots or pages, anything written over or never copied, gives other tokens than `expected`.
"""

import collections
import dataclasses

import jax
import numpy as np

from m1jax.inference.capacity import Capacity
from m1jax.inference.device import Decoded
from m1jax.inference.stopping import NEVER

VOCAB = 50
LAYERS, K = 2, 1


def mix(*numbers):
    result = 17
    for number in numbers:
        result = (result * 1_000_003 + int(number) + 1) % (2**61 - 1)
        result ^= result >> 23
    return result


def draw(state, tokens, weights, key, sample, position):
    """(token, log-probability) after these tokens."""
    found = mix(state, *tokens, weights, *key, sample, position)
    certain = mix(found, 1) % 3  # two tokens of three count as repetition
    return found % VOCAB, -0.001 if certain else -1.0 - found % 7


def route(token, position):
    return np.array([[token % 8], [position % 8]], np.uint8)


class FakeRunner:
    vocab_size = VOCAB
    records_routes = True
    top = 0
    constrains = False
    guides_ahead = True

    def __init__(self, capacity: Capacity, weights: int = 0) -> None:
        self.capacity, self.weights = capacity, weights
        self.states = [
            mix(99, slot) for slot in range(capacity.parts * capacity.slots)
        ]  # never zero: zeros must be asked for
        self.pages = np.full((capacity.parts * capacity.pages, capacity.page_size), -1)
        self.unseen: list[FakeCall] = []
        """whose results nobody has asked for"""
        self.faulty: set[int] = set()
        """tokens after which the logits are no numbers"""

    def load(self, params):
        assert not self.unseen
        self.weights = params
        return 0

    def rest(self):
        self.weights = None
        self.states = [mix(98, slot) for slot in range(len(self.states))]

    def copy(self, copies):
        for copy in copies:
            self.states[copy.slot_to] = 0 if copy.slot_from < 0 else self.states[copy.slot_from]
            if copy.page_from >= 0:
                self.pages[copy.page_to] = self.pages[copy.page_from]

    def read(self, sequence, token):
        """One token goes through the model; there is its memory's only writer."""
        at = sequence.computed + self.ahead
        self.states[sequence.slot] = mix(self.states[sequence.slot], token, self.weights)
        self.pages[sequence.pages[at // self.capacity.page_size], at % self.capacity.page_size] = token
        self.ahead += 1
        return route(token, at)

    def prefill(self, shape, chunks):
        assert shape in self.capacity.prefill
        parts = collections.Counter(chunk.sequence.row // self.capacity.rows for chunk in chunks)
        assert 0 < max(parts.values()) <= shape[0]
        assert len({chunk.sequence.row for chunk in chunks}) == len(chunks)
        routes = []
        for chunk in chunks:
            s = chunk.sequence
            assert 0 < chunk.count <= shape[1]
            self.ahead = 0
            routes.append(np.stack([self.read(s, t) for t in s.tokens[s.computed : s.computed + chunk.count]]))
        return routes

    def decode(self, sequences, allowances, most, patience, after):
        assert after is None or self.capacity.ahead
        assert self.unseen == ([] if after is None else [after])
        assert 0 < patience <= len(sequences)
        rows, steps = len(sequences), self.capacity.steps
        assert 0 < most <= steps
        assert len({s.row for s in sequences}) == rows
        out = Decoded(
            np.zeros(rows, np.int32),
            np.zeros((rows, steps), np.int32),
            np.zeros((rows, steps), np.float32),
            np.zeros((rows, steps), np.float32),
            np.zeros(rows, np.int32),
            np.array([s.certain for s in sequences], np.int32),
            np.zeros((rows, steps, LAYERS, K), np.uint8),
        )
        for i, (s, allowance) in enumerate(zip(sequences, allowances)):
            part = s.row // self.capacity.rows
            assert s.slot == s.row + part * self.capacity.snapshots
            assert all(page // self.capacity.pages == part for page in s.pages)
            assert s.computed == len(s.tokens) - 1
            follows = after is not None and s in after.sequences
            assert 0 < allowance <= most + (steps if follows else 0)
            token, before = s.tokens[-1], 0
            if follows:  # from where the call before left it
                at = after.sequences.index(s)
                before, out.certain[i] = after.out.counts[at], after.out.certain[at]
                token = after.out.tokens[at, before - 1] if before else token
                allowance = 0 if after.out.reasons[at] else min(most, allowance - before)
            self.ahead = before
            for step in range(allowance):
                out.routes[i, step] = self.read(s, token)
                memory = self.pages[s.pages].reshape(-1)[: s.computed + self.ahead]
                fault = token in self.faulty
                token, logp = draw(self.states[s.slot], memory, self.weights, s.key, s.sample, s.new + before + step)
                logp = np.nan if fault else logp
                out.tokens[i, step], out.logp[i, step], out.nucleus_logp[i, step] = token, logp, logp / 2
                out.counts[i] += 1
                out.reasons[i] = self.reason(s, token, logp, out.certain, i)
                if out.reasons[i]:
                    break
        call = FakeCall(self, list(sequences), out)
        self.unseen.append(call)
        return call

    @staticmethod
    def reason(s, token, logp, certain, i):
        stop = s.request.sampling.repetition_stop
        certain[i] = certain[i] + 1 if stop is not None and logp > np.log(stop.probability) else 0
        if np.isnan(logp):
            return 3
        if token in s.request.sampling.end_ids:
            return 1
        return 2 if certain[i] >= (NEVER if stop is None else stop.tokens) else 0


@dataclasses.dataclass
class FakeCall:
    runner: FakeRunner
    sequences: list
    out: Decoded

    def result(self):
        assert self.runner.unseen.pop(0) is self
        return self.out


@dataclasses.dataclass
class Expected:
    tokens: list[int]
    logp: list[float]
    written: list[bool]
    finish: str | None


def expected(request, sample, weights=0, begun=()):
    """What a sample must come to, from the definition alone. `begun`: (token, logp, written) that a fork inherits."""
    sampling = request.sampling
    key = np.asarray(jax.random.key_data(request.key))
    tokens, prompt = [int(t) for t in request.tokens], len(request.tokens)
    out = Expected([], [], [], None)
    certain, budget = 0, sampling.thinking_budget

    def look():
        """Whether a thought is open, and its length, from all the tokens there are. Openings of one id or none."""
        text, closing = tokens[prompt - len(budget.open) :], list(budget.close)
        start = 0 if not budget.open else text.index(budget.open[0]) + 1 if budget.open[0] in text else None
        thought = [] if start is None else text[start:]
        closed = any(thought[i : i + len(closing)] == closing for i in range(len(thought)))
        return start is not None and not closed, len(thought)

    def state():
        result = 0
        for token in tokens:
            result = mix(result, token, weights)
        return result

    while out.finish is None:
        number = len(out.tokens)
        if number < len(begun):
            token, logp, written = begun[number]
        else:
            token, logp = draw(state(), tokens, weights, key, sample, number)
            written = True
        tokens.append(token)
        out.tokens.append(token)
        out.logp.append(logp)
        out.written.append(written)
        if written:
            stop = sampling.repetition_stop
            certain = certain + 1 if stop is not None and logp > np.log(stop.probability) else 0
            if token in sampling.end_ids:
                out.finish = "stop"
            elif stop is not None and certain >= stop.tokens:
                out.finish = "repetition"
        if out.finish is None and budget is not None and len(out.tokens) >= len(begun):
            inside, spent = look()
            if inside and spent >= budget.tokens:
                for token in budget.close[: sampling.max_new_tokens - len(out.tokens)]:
                    tokens.append(token)
                    out.tokens.append(token)
                    out.logp.append(0.0)
                    out.written.append(False)
        if out.finish is None and len(out.tokens) >= sampling.max_new_tokens:
            out.finish = "length"
    return out


def check(request, completion, weights=0, inherited=0):
    """A completion is what the definition says; a fork's first tokens, so many, are its parent's."""
    begun = list(zip(completion.tokens.tolist(), completion.logp.tolist(), completion.written.tolist()))[:inherited]
    want = expected(request, completion.sample, weights, begun)
    assert completion.tokens.tolist() == want.tokens
    assert completion.finish == want.finish
    np.testing.assert_allclose(completion.logp, want.logp, rtol=1e-6)
    np.testing.assert_allclose(completion.nucleus_logp, np.array(want.logp) / 2, rtol=1e-6)
    assert completion.written.tolist() == want.written
    check_routes(request, completion)


def check_routes(request, completion):
    if request.record_routes:
        tokens = [*request.tokens, *completion.tokens]
        forced = np.argmax(completion.written[::-1])  # at the very end
        computed = len(tokens) - 1 - forced
        np.testing.assert_array_equal(completion.routes, [route(t, i) for i, t in enumerate(tokens[:computed])])
    else:
        assert completion.routes is None
