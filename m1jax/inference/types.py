"""What crosses the engine's door: requests go in, events and completions come out."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt8, UInt32

Finish = Literal["stop", "length", "repetition", "cancelled", "fault"]
"""Why a completion ended: an end id, max_new_tokens, the repetition stop, `Engine.cancel`, or logits that are no
numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionStop:
    """Ends a completion after so many tokens in a row each with more than this probability (report, section 4.2)."""

    probability: float = 0.99
    tokens: int = 3000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkingBudget:
    """How long a thought may be; one that is longer is closed by the engine, and the model goes on to its answer."""

    tokens: int
    """of the thought, its opening not counted; at least 1"""
    close: tuple[int, ...]
    """the ids that end a thought, and that the engine writes where the model did not"""
    open: tuple[int, ...] = ()
    """the ids that begin one, at the end of the prompt or in the completion; none: the completion begins inside it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one request are drawn, and when they end. M1's own temperature and top_p."""

    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token"""
    top_p: float = 0.95
    """draw from the likeliest tokens that together have this probability, in (0, 1]"""
    max_new_tokens: int = 256
    end_ids: tuple[int, ...] = ()
    """ids that end the completion, which keeps them as its last token; at most `stopping.END_IDS` of them"""
    repetition_stop: RepetitionStop | None = None
    thinking_budget: ThinkingBudget | None = None


class Matcher(Protocol):
    """Follows one completion and says what may come next."""

    def allowed(self, left: int) -> UInt32[np.ndarray, " words"]:
        """The ids that may be drawn now, id i as bit i % 32 of word i // 32; at least one. `left`: how many tokens may
        still be written, this one among them."""
        ...

    def take(self, tokens: Sequence[int]) -> None:
        """These tokens were written, forced ones among them."""
        ...


class Constraint(Protocol):
    """What completions must look like."""

    def begin(self) -> Matcher:
        """A matcher for a completion that has no token yet."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Token t of sample s is drawn with ``fold_in(fold_in(key, s), t)``, whatever else the engine is doing.
    """

    tokens: Int32[np.ndarray, " prompt"]
    key: Key[Array, ""]
    sampling: Sampling = Sampling()
    samples: int = 1
    """continuations; they share the prompt's prefill"""
    record_routes: bool = False
    """return the experts of every token; the engine must have been made for it"""
    junctions: tuple[int, ...] = ()
    """lengths of the prompt at which other requests may part from this one (the end of the system prompt and tools, of
    each turn): states are kept there. The end of the prompt is always one, and where two prompts were seen to part"""
    keep: bool = True
    """keep the states at the end of each completion for a request that goes on from there"""
    top: int = 0
    """so many of the likeliest tokens are told beside each that is drawn; the engine must have been made for it"""
    constraint: Constraint | None = None
    """tokens are drawn from those that it allows; the engine must have been made for it"""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation of n tokens. A token that the engine forced (see `ThinkingBudget`) has log-probability 0."""

    tokens: Int32[np.ndarray, " n"]
    """the end id included, where one came"""
    logp: Float32[np.ndarray, " n"]
    """natural log, under the tempered policy before the nucleus cut (at temperature 0: at temperature 1); this is what
    `MiniMaxM1.log_probs` computes in training. A constraint changes nothing about it"""
    nucleus_logp: Float32[np.ndarray, " n"]
    """after the cut, and among the tokens that a constraint allows: of the distribution that was drawn from; without a
    constraint equal to logp where top_p is 1 or the temperature 0"""
    written: Bool[np.ndarray, " n"]
    """drawn from the model, not forced"""
    version: Int32[np.ndarray, " n"]
    """of the weights that computed each token"""
    routes: UInt8[np.ndarray, "computed layers k"] | None
    """the experts of the positions that were computed, the prompt's and the completion's: all but the last token, and
    but for forced tokens at the very end. None where they were not asked for, or a cancelled request was waiting"""
    finish: Finish
    sample: int
    """which of the request's samples this is"""


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What `Engine.submit` gives for a request; numbers count from 0 and are never used twice."""

    number: int


@dataclasses.dataclass(frozen=True)
class Wrote:
    """Tokens that a sample of a request has gained, forced ones among them."""

    ticket: Ticket
    sample: int
    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """for each token, where the request asks for it: the likeliest (id, log-probability) in its place, best first;
    forced tokens have none"""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A sample of a request has ended; nothing more will be heard of it."""

    ticket: Ticket
    sample: int
    completion: Completion


Event = Wrote | Finished


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `Engine.load` did."""

    version: int
    bytes: int
    """that all devices together took over from others; 0 where weights lie on one device"""
    seconds: float
    """until the weights were in place"""
