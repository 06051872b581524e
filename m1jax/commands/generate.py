"""`m1jax generate`: let a model answer prompts."""

import contextlib
import dataclasses
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from m1jax.errors import UserError, require_positive, require_seed

if TYPE_CHECKING:
    from m1jax.chat import Tokenizer
    from m1jax.inference import Generation

ROWS = 64
"""answers to the prompts of a file that are written at once"""
EXPECTED = '{"prompt": "..."} or {"messages": [...]}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Let a model answer prompts, as a chat or as plain continuation.

    m1jax generate runs/demo --prompt "17+25="
    m1jax generate models/my-model --prompts questions.jsonl --chat > answers.jsonl
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory with config.json, *.safetensors and tokenizer.json: a published model, or one that m1jax saved; or a
    run's directory, whose export is taken."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask; give it several times for several answers."""
    prompts: Path | None = None
    """File of JSON lines (also .gz) or Parquet, {"prompt": "..."} or {"messages": [...]}. Answers are JSON lines: the
    record, with "sample" (its number), "response" and "finish_reason"."""
    chat: bool = False
    """Put the prompt into the model's chat format; without it, the text is simply continued."""
    system: str | None = None
    """System message of the chat."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    samples: int = 1
    """Answers to each prompt."""
    seed: int = 0
    """The same seed gives the same answers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; auto: float32 on CPU, bfloat16 on GPU and TPU."""


class Question(NamedTuple):
    """A prompt and what came with it."""

    text: str
    record: Mapping[str, Any]


def main(config: Config) -> None:
    """Prints the answers to standard output, one after the other; what it waits for to standard error.

    Raises:
        UserError: the directory holds no model, or a prompt is empty or too long (of a file, before any is answered).
    """
    if bool(config.prompt) == (config.prompts is not None):
        raise UserError('generate: give what to answer, either as --prompt "..." or as --prompts FILE')
    if config.system is not None and not config.chat:
        raise UserError("generate: --system belongs to the chat format; add --chat")
    if config.prompts is not None:  # the other way, `generate` itself looks at these
        require_seed(config.seed)
        require_positive(config, "samples", "max_new_tokens")
    import jax.numpy as jnp

    import m1jax
    from m1jax.chat import Tokenizer
    from m1jax.inference import generate
    from m1jax.weights.directory import locate, read_config

    directory = locate(config.model)
    tokenizer = Tokenizer.from_dir(directory)
    if config.prompts is None:
        questions = [Question(_prompt(config, {"prompt": text}), {"prompt": text}) for text in config.prompt]
    else:
        room = read_config(directory).max_position_embeddings - config.max_new_tokens
        questions = _read(config.prompts, config, tokenizer, room)
    with _patience(f"reading {directory}"):
        model = m1jax.from_pretrained(directory, dtype=None if config.dtype == "auto" else jnp.dtype(config.dtype))
    # One call for the command line's; of a file so many at once, each with a seed of its own: its answers do not depend
    # on what else is in the file.
    size = len(questions) if config.prompts is None else max(1, ROWS // config.samples)
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        own_seeds = [(config.seed + start + number) % 2**32 for number in range(len(batch))]
        with _patience("compiling for prompts of this size, then generating"):
            results = generate(
                model,
                [question.text for question in batch],
                tokenizer=tokenizer,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                samples_per_prompt=config.samples,
                seed=config.seed if config.prompts is None else own_seeds,
            )
        for number, result in enumerate(results):
            question, sample = batch[number // config.samples], number % config.samples
            if config.prompts is None:
                _print_text(question, sample, result, len(results), config.max_new_tokens)
            else:
                _print_line(question, sample, result)
        if config.prompts is not None:
            print(f"m1jax: {start + len(batch)} of {len(questions)} prompts answered", file=sys.stderr, flush=True)


def _print_text(question: Question, sample: int, result: "Generation", results: int, limit: int) -> None:
    if results > 1:
        print(f"--- {question.record['prompt']!r}, answer {sample + 1}")
    print(result.text)
    if result.finish_reason == "length":
        print(f"[cut at --max-new-tokens {limit}]")


def _print_line(question: Question, sample: int, result: "Generation") -> None:
    answer = {"sample": sample, "response": result.text, "finish_reason": result.finish_reason}
    print(json.dumps({**question.record, **answer}, ensure_ascii=False, default=str), flush=True)


def _read(path: Path, config: Config, tokenizer: "Tokenizer", room: int) -> list[Question]:
    """The prompts of a file; UserError names the line of one that cannot be answered."""
    from m1jax.train.data import Source

    def convert(record: dict[str, Any]) -> Question:
        text = _prompt(config, record)
        if not (tokens := len(tokenizer.encode(text))):
            raise UserError("the prompt is empty; a model needs at least one token to start from")
        if tokens > room:
            raise UserError(
                f"a prompt of {tokens} tokens; with max_new_tokens = {config.max_new_tokens} the model has {room} "
                "positions for it"
            )
        return Question(text, record)

    source = Source(path, convert, EXPECTED)
    return [source[index] for index in range(len(source))]


def _prompt(config: Config, record: Mapping[str, Any]) -> str:
    """The text that the model continues."""
    from m1jax.chat import render

    if "messages" in record:
        return render(record["messages"], record.get("tools"))
    prompt = record.get("prompt")
    if not isinstance(prompt, str):
        raise UserError(f"'prompt' is {prompt!r:.100}; expected {EXPECTED}")
    if not config.chat:
        return prompt
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    return render([*system, {"role": "user", "content": prompt}])


@contextlib.contextmanager
def _patience(what: str, seconds: float = 2.0) -> Iterator[None]:
    """Says what is being waited for, if it takes longer than some seconds."""
    timer = threading.Timer(seconds, lambda: print(f"m1jax: {what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
