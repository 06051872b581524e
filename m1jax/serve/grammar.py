"""Replies that must be JSON, or calls of tools: which tokens may come next, by llguidance.

A reply may begin with a thought, which is free. A reply that nears its last token is brought to its end on a short way,
so that it is whole wherever it has the room for that.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
from jaxtyping import UInt32

from m1jax.chat import TextStream, Tokenizer, Tool
from m1jax.chat.tokens import END_THINK, END_TOOL_CALLS, THINK, TOOL_CALLS
from m1jax.errors import UserError

_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes it, and the model: white space without end would be JSON, too."""
_LETTER = "q"
"""Where this may come, a string is open: no word of JSON has it."""
_ENDINGS = (
    "}",
    "]",
    END_TOOL_CALLS,
    END_TOOL_CALLS[0],
    "0",
    '"',
    "e",
    "s",
    "u",
    "l",
    "n",
    "[",
    "{",
    "-",
    "1",
    ",",
    ":",
)
"""What leads out of an unfinished JSON value, the shorter way first."""


class Grammars:
    """Makes constraints for a model.

    Args:
        vocab_size: the model's, which may be larger than its tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size

    @functools.cached_property
    def library(self) -> llguidance.LLTokenizer:
        """The tokenizer as llguidance knows it; takes a moment to make."""
        return llguidance.LLTokenizer(
            self.tokenizer.to_json(), n_vocab=self.vocab_size, eos_token=self.tokenizer.eos_id
        )

    @functools.cached_property
    def close(self) -> list[int]:
        """What ends a thought."""
        return self.tokenizer.encode(f"\n{END_THINK}\n")

    @functools.cached_property
    def preferred(self) -> _Preferred:
        return _Preferred(self.tokenizer)

    def json(self, schema: Mapping[str, Any]) -> Form:
        """Replies that fit a JSON schema. Raises UserError for a schema that cannot be enforced."""
        return self._form(f"body: {_json(schema)}\n")

    def calls(self, tools: Sequence[Tool], most: int | None) -> Form:
        """Replies that call these tools: at least once, at most so many times.

        Raises:
            UserError: a tool's schema cannot be enforced.
        """
        more = "" if most == 1 else ' ("\\n" call)*' if most is None else f' ("\\n" call){{0,{most - 1}}}'
        lines = [
            f'body: {self._tag(TOOL_CALLS)} "\\n" call{more} "\\n" {self._tag(END_TOOL_CALLS)}',
            "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
        ]
        for number, tool in enumerate(tools):
            head = json.dumps(f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": ')
            lines.append(f'call_{number}: {head} arguments_{number} "}}"')
            lines.append(f"arguments_{number}: {_json({'type': 'object', **tool.arguments_schema})}")
        return self._form("\n".join(lines) + "\n")

    def _tag(self, tag: str) -> str:
        """A tag in a grammar: one token where it is one, else its letters."""
        tokens = self.tokenizer.encode(tag)
        single = len(tokens) == 1 and self.library.is_special_token(tokens[0])
        return tag if single else json.dumps(tag)

    def _form(self, body: str) -> Form:
        if self._tag(END_THINK) == END_THINK:
            thought = f"{self._tag(THINK)} /(?s:.*)/ {END_THINK}"
        else:
            thought = f"{self._tag(THINK)} thinking"
            body += f"thinking[lazy]: /(?s:.*){END_THINK.replace('/', chr(92) + '/')}/\n"
        whole = f'start: thought? body\nthought: {thought} ("\\n" "\\n"?)?\n{body}'
        problem = llguidance.LLMatcher.validate_grammar(whole, self.library)
        if problem:
            raise UserError(f"The schema cannot be enforced: {problem.splitlines()[0]:.300}")
        return Form(self, whole, f'start: ("\\n" "\\n"?)? body\n{body}')


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _SPACES})}"


class Form:
    """`inference.Constraint`: a grammar with a thought before it, and what of it is left behind one."""

    def __init__(self, grammars: Grammars, whole: str, body: str):
        self._grammars = grammars
        self._whole, self._body = (llguidance.LLMatcher(grammars.library, text, log_level=0) for text in (whole, body))

    def begin(self) -> Guide:
        return Guide(self._grammars, self._whole.deep_copy(), self._body)


class Guide:
    """`inference.Matcher`: where a reply stands in its grammar."""

    def __init__(self, grammars: Grammars, whole: llguidance.LLMatcher, body: llguidance.LLMatcher):
        self._words = -(-grammars.vocab_size // 32)
        self._preferred, self._close = grammars.preferred, grammars.close
        self._matcher, self._body = whole, body
        self._stream = TextStream(grammars.tokenizer)
        self._opening: str | None = ""
        """the text, as long as it may be that of a thought"""
        self._thinking = False
        self._margin: int | None = None
        self._rest = 0
        """tokens that may be drawn before the way to the end must be measured again"""
        self._ending = False
        self._forced: list[int] = []

    def allowed(self, left: int) -> UInt32[np.ndarray, " words"]:
        if self._must_end(left) and (token := self._way_out()) is not None:
            return self._only(token)
        mask = self._matcher.compute_bitmask()
        if not mask.strip(b"\0"):  # forced tokens have left the grammar in a way that nobody thought of
            return self._only(self._preferred.end)
        return np.frombuffer(mask, np.uint32)[: self._words]

    def take(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._rest -= 1
            if self._forced and self._forced[0] == token:
                del self._forced[0]
            self._matcher.consume_token(token)
            if self._opening is not None:
                self._follow(token)

    def _follow(self, token: int) -> None:
        """Whether a thought is open."""
        assert self._opening is not None
        self._opening += self._stream.feed([token])
        if not self._thinking:
            self._thinking = self._opening.startswith(THINK)
            if not self._thinking and not THINK.startswith(self._opening):
                self._opening = None
        elif END_THINK in self._opening:
            self._thinking, self._opening = False, None
            if self._matcher.is_error():  # the engine has closed the thought in the middle of a letter
                self._matcher = self._body.deep_copy()
        else:
            self._opening = THINK + self._opening[-len(END_THINK) :]

    def _must_end(self, left: int) -> bool:
        if not self._ending and self._rest <= 0:
            need = self._need(left)
            if self._margin is None:  # a schema that asks for much may ask for it again
                self._margin = min(16 + need, left // 4)
            slack = left - need - self._margin
            self._ending, self._rest = slack <= 0, max(1, slack // 8)
        return self._ending

    def _need(self, most: int) -> int:
        """How many tokens the short way to the end has, the last among them; `most` is enough to know."""
        matcher, count = self._matcher.deep_copy(), 0
        if self._thinking:
            matcher, count = self._body.deep_copy(), len(self._close)
        while count < most and (token := _next(matcher, self._preferred)) is not None:
            count += 1
            if token == self._preferred.end:
                return count
            matcher.consume_token(token)
        return most

    def _way_out(self) -> int | None:
        if self._thinking and not self._forced:
            self._forced = self._close.copy()
        return self._forced[0] if self._forced else _next(self._matcher, self._preferred)

    def _only(self, token: int) -> UInt32[np.ndarray, " words"]:
        mask = np.zeros(self._words, np.uint32)
        mask[token // 32] = np.uint32(1) << np.uint32(token % 32)
        return mask


class _Preferred:
    """Tokens that end a reply soon, the better first."""

    def __init__(self, tokenizer: Tokenizer):
        letter, quote = (_single(tokenizer, text) for text in (_LETTER, '"'))
        assert letter is not None and quote is not None
        self.end, self.letter, self.quote = tokenizer.eos_id, letter, quote
        self.others = [token for text in _ENDINGS if (token := _single(tokenizer, text)) is not None]


def _single(tokenizer: Tokenizer, text: str) -> int | None:
    tokens = tokenizer.encode(text)
    return tokens[0] if len(tokens) == 1 else None


def _next(matcher: llguidance.LLMatcher, preferred: _Preferred) -> int | None:
    """The token that leads to the end; None where no preferred one may come."""

    def may(token: int) -> bool:
        return matcher.validate_tokens([token]) == 1

    if matcher.is_accepting():
        return preferred.end
    if may(preferred.letter):  # in a string
        return preferred.quote if may(preferred.quote) else preferred.letter
    return next((token for token in preferred.others if may(token)), None)
