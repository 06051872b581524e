"""Text to token ids and back: a directory's own byte-level BPE, or a built-in tokenizer of single bytes."""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from m1jax.chat.messages import plain
from m1jax.chat.template import check_tools, pieces, template_source
from m1jax.chat.tokens import BEGIN_OF_DOCUMENT, BOS, EOS, SPECIAL_TOKENS, TAGS
from m1jax.errors import UserError

__all__ = ["BEGIN_OF_DOCUMENT", "BOS", "EOS", "SPECIAL_TOKENS", "TextStream", "Tokenizer", "check_unicode"]


class Tokenizer:
    """What a model of this family needs of a tokenizer.

    Nothing is added in front of a text or behind it.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wraps a tokenizer; raises UserError where it lacks the prompt format's special tokens."""
        self._backend = backend
        self.bos_id = self.token_id(BOS)
        self.eos_id = self.token_id(EOS)

    @classmethod
    def from_dir(cls, directory: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json`, as published beside the weights; raises UserError where it is missing or damaged."""
        path = Path(directory) / "tokenizer.json"
        if not path.parent.is_dir():
            raise UserError(f"{directory} is no directory; expected one that holds a model and its tokenizer.json")
        if not path.is_file():
            raise UserError(f"{path} does not exist: copy the tokenizer.json that belongs to the model to {directory}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises nothing more specific
            raise UserError(f"{path} is not a readable tokenizer file ({error}): copy it again") from error
        try:
            return cls(backend)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def tiny(cls) -> "Tokenizer":
        """One token for each byte (its id is the byte), and the special tokens behind: 263 in all."""
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = sorted(set(range(256)) - set(printable))
        # GPT-2's alphabet: a printable letter stands for each byte, its own where it has one.
        letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: byte for byte, letter in letters.items()}, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens among them; a model's vocabulary must be at least as large."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """What stands in `tokenizer.json`."""
        return self._backend.to_str()

    def token_id(self, token: str) -> int:
        """The id of one token; raises UserError where there is none."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token!r}: it does not belong to a MiniMax-M1 model")
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens in it become theirs. Raises UserError where it is no valid Unicode."""
        check_unicode(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text that somebody else wrote: what spells a special token in it stays text.

        Raises UserError where it is no valid Unicode.
        """
        check_unicode(text)
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text in which `hide` has marked what must stay text."""
        check_unicode(text)
        ids: list[int] = []
        for piece in re.split(self._pattern, text):
            if (special := self._special.get(piece)) is not None:
                ids.append(special)
            elif piece:
                ids += self._plain.encode(_show(piece), add_special_tokens=False).ids
        return ids

    def hide(self, text: str, keep: Sequence[str] = ()) -> str:
        """Marks a text for `encode_marked`, so that no special token is seen in it but those to `keep`, even where
        texts that are put together spell one."""
        kept = "|".join(map(re.escape, keep))
        return re.sub(
            f"{f'({kept})|' if kept else '()'}([{self._first}])|{_MARK}",
            lambda m: m[1] or (m[2] + _BREAK if m[2] else _ESCAPED),
            text,
        )

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """The ids of the special tokens and of the format's tags, where the tokenizer has them as tokens."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special or token.content in TAGS}

    @functools.cached_property
    def _pattern(self) -> str:
        return f"({'|'.join(map(re.escape, sorted(self._special, key=len, reverse=True)))})"

    @functools.cached_property
    def _first(self) -> str:
        return "".join(map(re.escape, sorted({token[0] for token in self._special})))

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, blind for special tokens and tags."""
        description = json.loads(self._backend.to_str())
        for token in description["added_tokens"]:
            token["special"] = token["content"] in self._special
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Iterable[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text of some ids; bytes that are no UTF-8 (a cut letter) become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` (with the chat template), as AutoTokenizer reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "chat_template": template_source(),
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_unicode(text: str) -> None:
    """Raises UserError for what strings can hold and texts cannot: half a UTF-16 pair, bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 1]
        raise UserError(f"no valid Unicode at character {error.start + 1}, the last of {around!a}") from error


# A private character, doubled where a text holds it itself, breaks what would spell a special token.
_MARK = "\ue000"
_ESCAPED = "\ue000\ue001"
_BREAK = "\ue000\ue002"


def _show(text: str) -> str:
    return text.replace(_BREAK, "").replace(_ESCAPED, _MARK)


class TextStream:
    """Ids to text as they come: the pieces together are what `Tokenizer.decode` makes of all ids.

    An unfinished letter is kept back until its bytes are there, or until it is certain that they never come.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # from the last border of letters on
        self._given = 0  # characters of their text that were given out

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        self._ids += [int(i) for i in ids]
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            new, self._ids, self._given = text[self._given :], [], 0
            return new
        new = text[self._given : -1]
        self._given = max(self._given, len(text) - 1)
        # A letter has four bytes at most, so a long tail is mostly rubbish, which must not be decoded again and again.
        if len(self._ids) > 8:
            self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """All ids but a few, from a border of letters on."""
        for few in range(4, 8):
            head, tail = self._tokenizer.decode(self._ids[:-few]), self._tokenizer.decode(self._ids[-few:])
            if head + tail == text:
                self._ids, self._given = self._ids[-few:], self._given - len(head)
                return

    def close(self) -> str:
        """What is left: U+FFFD for an unfinished letter, otherwise nothing."""
        new = self._tokenizer.decode(self._ids)[self._given :]
        self._ids, self._given = [], 0
        return new


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> np.ndarray:
    """The conversation as tokens, for the model to go on with the assistant's next turn: [T] int32.

    Texts that spell a special token stay texts; of what the assistant wrote, `<think>`, `<tool_calls>` and their
    ends are tokens. A turn of the assistant has the tokens that it had when it was written, if it was written in the
    tokenizer's usual way, so that a growing conversation has its older self as a prefix.

    Raises:
        UserError: a message that the format cannot express, naming its index.
    """
    return _encode(tokenizer, messages, tools, True)[0]


def partings(tokenizer: Tokenizer, prompt: np.ndarray, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Lengths of a conversation's prompt at which others are likely to part from it: the end of the system prompt and
    the tools, and the beginning of the last message, where it is a user's.

    Args:
        prompt: what `encode_prompt` made of the messages.
    """
    turns = np.flatnonzero(prompt == tokenizer.bos_id)  # the last one is the assistant's, to be written
    spoken = [message["role"] for message in plain(messages) if message["role"] != "system"]
    places = {int(turns[-1 - len(spoken)])} if 0 < len(spoken) < len(turns) - 1 else set()
    if spoken[1:] and spoken[-1] == "user":
        places.add(int(turns[-2]))
    return tuple(sorted(places))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The conversation as tokens, for training on it.

    Each turn of the assistant is tokenized apart from what is before it, because this is what generation does: a merge
    over the border would teach a token that the model, given the prompt's tokens, can never write.

    Returns:
        ids: [T] int32.
        assistant_mask: [T] bool, true for the tokens that the assistant writes, its `<end_of_sentence>` among them.

    Raises:
        UserError: a message that the format cannot express, naming its index.
    """
    return _encode(tokenizer, messages, tools, False)


def _encode(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> tuple[np.ndarray, np.ndarray]:
    hidden = [
        {**message, "content": _hidden(tokenizer, message["content"], TAGS if message["role"] == "assistant" else ())}
        for message in plain(messages)
    ]
    hidden_tools = [_hidden(tokenizer, tool) for tool in check_tools(tools)]
    ids: list[int] = []
    mask: list[bool] = []
    context = ""
    for text, written in [*pieces(hidden, hidden_tools, add_generation_prompt), ("", True)]:
        if not written:
            context += text
            continue
        for piece, value in ((context, False), (text, True)):
            tokens = tokenizer.encode_marked(piece)
            ids += tokens
            mask += [value] * len(tokens)
        context = ""
    return np.array(ids, np.int32), np.array(mask, bool)


def _hidden(tokenizer: Tokenizer, value: Any, keep: Sequence[str] = ()) -> Any:
    """`hide` on every text of a JSON value."""
    if isinstance(value, str):
        return tokenizer.hide(value, keep)
    if isinstance(value, Mapping):
        return {_hidden(tokenizer, key): _hidden(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(tokenizer, item) for item in value]
    return value
