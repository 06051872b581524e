"""`m1jax generate`: let a model answer prompts."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from m1jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Let a model answer prompts, as a chat or as plain continuation.

    m1jax generate runs/demo/export --prompt "17+25="
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory with config.json, *.safetensors and tokenizer.json: a published model, or one that m1jax saved."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]]
    """What to ask; give it several times for several answers."""
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


def main(config: Config) -> None:
    """Prints the answers to standard output, one after the other.

    Raises:
        UserError: the directory holds no model, or a prompt is empty or too long.
    """
    if not config.prompt:
        raise UserError('generate: nothing to answer; give at least one --prompt "..."')
    if config.system is not None and not config.chat:
        raise UserError("generate: --system belongs to the chat format; add --chat")
    import jax.numpy as jnp

    import m1jax
    from m1jax.chat import Tokenizer, render
    from m1jax.inference import generate

    tokenizer = Tokenizer.from_dir(config.model)
    model = m1jax.from_pretrained(config.model, dtype=None if config.dtype == "auto" else jnp.dtype(config.dtype))
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    results = generate(
        model,
        [render([*system, {"role": "user", "content": p}]) if config.chat else p for p in config.prompt],
        tokenizer=tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        samples_per_prompt=config.samples,
        seed=config.seed,
    )
    for number, result in enumerate(results):
        if len(results) > 1:
            print(f"--- {config.prompt[number // config.samples]!r}, answer {number % config.samples + 1}")
        print(result.text)
        if result.finish_reason == "length":
            print(f"[cut at --max-new-tokens {config.max_new_tokens}]")
