"""`m1jax chat`: talk to a model in the terminal, and lend it tools."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from m1jax.errors import UserError, require_positive

if TYPE_CHECKING:
    from rich.console import Console

    from m1jax.agent import Agent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D ends the conversation.

    m1jax chat runs/demo
    m1jax chat models/my-model --tools tools.py --thinking-budget 40k
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory with config.json, *.safetensors and tokenizer.json: a published model, or one that m1jax saved; or a
    run's directory, whose export is taken."""
    tools: Path | None = None
    """Python file whose functions the model may call: type hints and docstrings tell it what they do. They run in this
    process, with all that it may do."""
    system: str | None = None
    """System message."""
    max_steps: int = 40
    """Turns of the model after each of yours."""
    max_new_tokens: int = 81_920
    """Longest turn, in tokens."""
    max_length: int | None = None
    """Longest conversation, in tokens; without a number, what the model and the device have room for."""
    thinking_budget: str | None = None
    """Tokens that a thought may have before it is closed and the answer begins: a number, 40k or 80k."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """The same seed and the same words give the same answers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; auto: float32 on CPU, bfloat16 on GPU and TPU."""


def main(config: Config) -> None:
    """Reads what a person says from standard input, line by line, and prints what the model says.

    Raises:
        UserError: the directory holds no model, an option is wrong, or the file of tools cannot be used.
    """
    require_positive(config, "max_steps", "max_new_tokens")
    import jax.numpy as jnp
    from rich.console import Console

    from m1jax.agent import Agent
    from m1jax.chat import Tokenizer
    from m1jax.inference.thinking import parse_budget
    from m1jax.local import LocalModel
    from m1jax.weights.directory import locate
    from m1jax.weights.pretrained import from_pretrained

    thinking = None if config.thinking_budget is None else parse_budget(config.thinking_budget)
    tools = [] if config.tools is None else functions(config.tools)
    directory = locate(config.model)
    model = LocalModel(
        from_pretrained(directory, dtype=None if config.dtype == "auto" else jnp.dtype(config.dtype)),
        Tokenizer.from_dir(directory),
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        thinking=thinking,
        max_length=config.max_length,
        seed=config.seed,
    )
    agent = Agent(model, tools, max_steps=config.max_steps)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    messages: list[Mapping[str, Any]] = []
    if config.system is not None:
        messages.append({"role": "system", "content": config.system})
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            said = input(prompt)
        except EOFError:
            return
        if said.strip():
            messages = _turn(agent, [*messages, {"role": "user", "content": said}], console)


def functions(path: Path) -> list[Callable[..., object]]:
    """The functions that a Python file defines, without those whose names begin with an underscore.

    Raises:
        UserError: there is no such file, it cannot be run, or it defines none.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a Python file whose functions the model may call")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # type hints are looked up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    found = [
        value
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == path.stem
        if not isinstance(value, type)
    ]
    if not found:
        raise UserError(f"{path} defines no function that the model could call")
    return found


def _turn(agent: "Agent", messages: list[Mapping[str, Any]], console: "Console") -> list[Mapping[str, Any]]:
    """Lets the model speak, and returns the conversation with what it said; as it was before, if it is stopped."""
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(_shown(agent, messages, console))
    console.print("\n[stopped]", style="dim")
    return messages[:-1]


async def _shown(agent: "Agent", messages: list[Mapping[str, Any]], console: "Console") -> list[Mapping[str, Any]]:
    from m1jax.agent import ToolResult, Transcript
    from m1jax.chat import CallError, Content, Reasoning, ToolCall

    async with contextlib.aclosing(agent.stream(messages)) as stream:
        async for event in stream:
            if isinstance(event, Content):
                console.out(event.text, end="")
            elif isinstance(event, Reasoning):
                console.out(event.text, end="", style="dim italic")
            elif isinstance(event, ToolCall):
                arguments = json.dumps(event.arguments, ensure_ascii=False)
                console.out(f"\n{event.name}({arguments})", style="cyan")
            elif isinstance(event, CallError):
                console.out(f"\n{event.message}", style="red")
            elif isinstance(event, ToolResult):
                console.out(event.text, style="green" if event.status == "ok" else "red")
            elif isinstance(event, Transcript):
                console.print()
                if event.ended == "overflow":
                    raise UserError("the conversation has reached the end of the model's context; begin a new one")
                return list(event.messages)
    raise AssertionError("a run ends with its transcript")
