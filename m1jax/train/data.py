"""Files as random-access sources of training examples, shuffled and mixed by grain.

Everything is read by position (grain's `MapDataset`): what number n of a mixture is depends on the files, the weights
and the seed alone, so that processes read only their shares, and a number is all there is to resume.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np

from m1jax.chat import Tokenizer, encode_chat
from m1jax.chat.tokenizer import BEGIN_OF_DOCUMENT, check_unicode
from m1jax.errors import UserError
from m1jax.train import packing
from m1jax.train.batch import Batch
from m1jax.train.files import open_records
from m1jax.weights.directory import read_config

T = TypeVar("T")
ENDLESS = 2**48  # values of a mixture: grain divides lengths as floats, which sys.maxsize does not survive
PAIR = '{"prompt": "...", "answer": "..."}'


class Source(Generic[T]):
    """One value per record of a file, read when it is asked for.

    Args:
        path: the file, in one of the formats of `m1jax.train.files`.
        convert: record -> value; raises UserError saying what is wrong with it.
        expected: how a record should look, for messages.
        columns: the keys that are looked at; None: all.

    Raises:
        UserError: the file is missing or empty, or a record is wrong (naming its line or row). All are looked at in the
            beginning, before any work is lost; of several processes, each looks at its share.
    """

    def __init__(
        self,
        path: str | Path,
        convert: Callable[[dict[str, Any]], T],
        expected: str,
        columns: Sequence[str] | None = None,
    ):
        self._path, self._convert = Path(path), convert
        self._records = open_records(path, expected, columns)
        for index in range(jax.process_index(), len(self), jax.process_count()):
            self[index]

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._path})"

    def __getitem__(self, index: int) -> T:
        record = self._records[index]
        try:
            return self._convert(record)
        except UserError as error:
            raise UserError(f"{self._records.where(index)}: {error}") from error


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a model's directory, for training that model.

    Raises:
        UserError: there is none, or it has more ids than the model has embeddings: under jit an id outside would
            silently read another row, or NaN.
    """
    tokenizer, config = Tokenizer.from_dir(directory), read_config(Path(directory))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{Path(directory) / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, the model's vocabulary "
            f"{config.vocab_size}; is the tokenizer another model's?"
        )
    return tokenizer


def prompt_answer(record: dict[str, Any]) -> tuple[str, str]:
    """The texts of `{"prompt": ..., "answer": ...}`. An answer may be a number; it becomes text."""
    if missing := [key for key in ("prompt", "answer") if key not in record]:
        raise UserError(f"no {' and no '.join(map(repr, missing))}; expected {PAIR}")
    prompt, answer = record["prompt"], record["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return _text("prompt", prompt), _text("answer", answer)


class Conversations(Source[Batch]):
    """Examples for fine-tuning, weight one on what the assistant writes and zero elsewhere.

    A record is `{"messages": [...], "tools": [...]}` (tools may be missing) in the prompt format of `m1jax.chat`, or
    `{"prompt": ..., "answer": ...}`, taken as they are with an end token behind the answer.

    Raises:
        UserError: also for a conversation without an assistant's turn, or longer than `longest` positions.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, longest: int):
        def convert(record: dict[str, Any]) -> Batch:
            if "messages" in record:
                ids, written = encode_chat(tokenizer, record["messages"], record.get("tools"))
                example = packing.masked(ids, written)
            else:
                prompt, answer = prompt_answer(record)
                example = packing.example(tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id])
            if not example.mask.any():
                raise UserError("nothing to learn: the assistant writes nothing in it")
            if example.positions > longest:
                raise UserError(f"{example.positions + 1} tokens; row_length is {longest}: raise it, or cut it")
            return example

        super().__init__(path, convert, f'{{"messages": [...]}} or {PAIR}', ("messages", "tools", "prompt", "answer"))


class Documents(Source[Batch]):
    """Examples for pre-training from records `{"text": "..."}`: a whole document each, of any length, all learned."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer):
        begin = tokenizer.token_id(BEGIN_OF_DOCUMENT)

        def convert(record: dict[str, Any]) -> Batch:
            text = _text("text", record.get("text"))
            return packing.example([begin], [*tokenizer.encode(text), tokenizer.eos_id])

        super().__init__(path, convert, '{"text": "..."}', ("text",))


def weighted(files: Sequence[str]) -> list[tuple[str, float]]:
    """(path, weight) of every "PATH" or "PATH=WEIGHT"; 1 where none is given.

    Raises:
        UserError: no file, or a weight that is no positive number.
    """
    if not files:
        raise UserError("data: give at least one file")
    found = []
    for file in files:
        path, _, weight = file.partition("=")
        try:
            found.append((path, float(weight or 1)))
        except ValueError:
            found.append((path, 0.0))
        if not 0 < found[-1][1] < float("inf"):
            raise UserError(f"data: {file!r}: {weight!r} is no weight; write FILE or FILE=2.5")
    return found


def mixture(sources: Sequence[tuple[Source[Any], float]], *, seed: tuple[int, ...]) -> grain.MapDataset:
    """An endless shuffled mixture; each source is gone through again and again, every time in another order.

    Args:
        sources: with weights, which say how many values are taken from each.
        seed: of the orders.
    """
    datasets = []
    for number, (source, _) in enumerate(sources):
        order = int(np.random.SeedSequence([*seed, number]).generate_state(1)[0])
        datasets.append(grain.MapDataset.source(source).shuffle(seed=order).repeat())
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, [weight for _, weight in sources])


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name!r} is {value!r:.100}; it must be a text that is not empty")
    check_unicode(value)
    return value
