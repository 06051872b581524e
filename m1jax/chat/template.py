"""MiniMax-M1's prompt format: messages (see `messages`) to text."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes

from m1jax.chat.messages import plain
from m1jax.errors import UserError


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt as text, byte for byte what the published template makes of it (where that accepts the messages).

    Args:
        messages: the conversation, oldest first (see `m1jax.chat.messages`). All system messages together open the
            prompt.
        tools: JSON schemas of the tools that the model may call.
        add_generation_prompt: end with the opening of an assistant's turn, for the model to write it.

    Raises:
        UserError: a message that the format cannot express, naming its index.
    """
    return "".join(text for text, _ in pieces(plain(messages), check_tools(tools), add_generation_prompt))


def pieces(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> Iterator[tuple[str, bool]]:
    """The text of `render` in pieces, each with whether the assistant writes it.

    Takes what `plain` and `check_tools` gave.
    """
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


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """The tools as a list; raises UserError for what is no list of JSON objects."""
    if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)):
        raise UserError(f"tools: expected a list of objects, got {tools!r:.100}")
    for index, tool in enumerate(tools or []):
        if not isinstance(tool, Mapping):
            raise UserError(f"tools[{index}]: expected an object, a tool's JSON schema, got {tool!r:.100}")
        try:
            json.dumps(tool)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"tools[{index}] is no JSON: {error}") from error
    return list(tools or [])
