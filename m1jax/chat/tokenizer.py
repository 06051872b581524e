"""Text to token ids and back: a directory's own byte-level BPE, or a built-in tokenizer of single bytes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from m1jax.chat.template import pieces, template_source
from m1jax.errors import UserError

BEGIN_OF_DOCUMENT = "<begin_of_document>"
BOS = "<beginning_of_sentence>"
EOS = "<end_of_sentence>"
# Ids 256, 257, ... of the built-in tokenizer, in this order.
SPECIAL_TOKENS = (BEGIN_OF_DOCUMENT, BOS, EOS, "<think>", "</think>", "<tool_calls>", "</tool_calls>")


class Tokenizer:
    """What a model of this family needs of a tokenizer.

    Special tokens that stand in a text become their ids; nothing is added in front or behind.
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
    ids: list[int] = []
    mask: list[bool] = []
    context = ""
    for text, written in [*pieces(messages, tools, False), ("", True)]:
        if not written:
            context += text
            continue
        for piece, value in ((context, False), (text, True)):
            tokens = tokenizer.encode(piece)
            ids += tokens
            mask += [value] * len(tokens)
        context = ""
    return np.array(ids, np.int32), np.array(mask, bool)
