"""MiniMax-M1's prompt format: messages to text.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": ...}`; the content is a string or a list of
parts `{"type": "text", "text": ...}`, in a tool's message with a `"name"` (of the tool) in the part or in the message.
An assistant's content holds its `<think>` and `<tool_calls>` as text, just as the model writes them.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes

from m1jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt as text, byte for byte what the published template makes of it (where that accepts the messages).

    Args:
        messages: the conversation, oldest first (see the module). All system messages together open the prompt.
        tools: JSON schemas of the tools that the model may call.
        add_generation_prompt: end with the opening of an assistant's turn, for the model to write it.

    Raises:
        UserError: a message that the format cannot express, naming its index.
    """
    return "".join(text for text, _ in pieces(messages, tools, add_generation_prompt))


def pieces(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool
) -> Iterator[tuple[str, bool]]:
    """The text of `render` in pieces, each with whether the assistant writes it."""
    _check(messages, tools)
    chunks = _template().generate(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
    return ((chunk, isinstance(chunk, _Written)) for chunk in chunks)


class _Written(str):
    """Text that the assistant writes."""


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}...{% endgeneration %}`, as Transformers understands it too."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> _Written:
        return _Written(caller())


def template_source() -> str:
    """The template itself, to be saved beside an exported model."""
    return resources.files("m1jax.chat").joinpath("template.jinja").read_text()


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(extensions=[_Generation])
    # Jinja's own filter sorts the keys and escapes for HTML; the published template is rendered by Transformers.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template_source())


def _check(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> None:
    for name, value in (("messages", messages), ("tools", tools or [])):
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise UserError(f"{name}: expected a list of objects, got {value!r:.100}")
    for index, tool in enumerate(tools or []):
        if not isinstance(tool, Mapping):
            raise UserError(f"tools[{index}]: expected an object, a tool's JSON schema, got {tool!r:.100}")
    if not messages:
        raise UserError("The conversation is empty: give at least one message.")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise UserError(
                f"{where}: expected an object whose role is one of {', '.join(ROLES)}, got {message!r:.100}"
            )
        if message.get("tool_calls"):
            raise UserError(f'{where}: write the calls into the content, as "<tool_calls>\\n{{...}}\\n</tool_calls>".')
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(_is_text(part) for part in parts):
            raise UserError(
                f'{where}: content must be a string or a list of {{"type": "text", "text": ...}}, got {content!r:.100}'
            )
        if message["role"] == "tool" and not all(part.get("name") or message.get("name") for part in parts):
            raise UserError(f"{where}: a tool's result needs the tool's name, in the message or in each part.")


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
