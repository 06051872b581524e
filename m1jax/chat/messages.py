"""Conversations as people and programs give them, put into the terms of M1's prompt format.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": ...}`; the content is a string or a list of
parts `{"type": "text", "text": ...}`, in a tool's message with a `"name"` (of the tool) in the part or in the message.
An assistant's content holds its `<think>` and `<tool_calls>` as text, just as the model writes them.

OpenAI's spelling is understood too: `reasoning_content` and `tool_calls` beside an assistant's content, a
`tool_call_id` in place of a tool's name, the role `developer` for `system`.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from m1jax.chat.tokens import END_THINK, END_TOOL_CALLS, THINK, TOOL_CALLS
from m1jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with nothing but a role and a content.

    The content is one text, whose parts are all joined; a tool's is a list of `{"type": "text", "name": ..., "text":
    ...}`, and the results that answer the calls of one turn (by `tool_call_id`) stand in one message.

    Raises:
        UserError: a message that the format cannot express, naming its index.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise UserError(f"messages: expected a list of objects, got {messages!r:.100}")
    if not messages:
        raise UserError("The conversation is empty: give at least one message.")
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the tools, by the id of the call
    answering = False
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise UserError(
                f"{where}: expected an object whose role is one of {', '.join(ROLES)}, got {message!r:.100}"
            )
        if role == "tool":
            parts = _results(where, message, names)
            if answering and "tool_call_id" in message:
                found[-1]["content"] += parts
            else:
                found.append({"role": role, "content": parts})
            answering = "tool_call_id" in message
            continue
        answering = False
        if role == "assistant":
            content = _written(where, message, names)
        else:
            content = "".join(part["text"] for part in _texts(where, message.get("content")))
        found.append({"role": role, "content": content})
    return found


def call_text(name: str, arguments: object) -> str:
    """One call as the model writes it, on a line of its own."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def _texts(where: str, content: object) -> list[Mapping[str, Any]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(_is_text(part) for part in parts):
        raise UserError(
            f'{where}: content must be a string or a list of {{"type": "text", "text": ...}}, got {content!r:.100}'
        )
    return list(parts)


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _results(where: str, message: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, str]]:
    identifier = message.get("tool_call_id")
    name = message.get("name") or (names.get(identifier) if isinstance(identifier, str) else None)
    parts = _texts(where, message.get("content"))
    if not all(isinstance(part.get("name") or name, str) for part in parts):
        raise UserError(f"{where}: a tool's result needs the tool's name, in the message or in each part.")
    if identifier is not None and not any(part.get("name") for part in parts):  # the parts of one call's result
        return [{"type": "text", "name": str(name), "text": "".join(part["text"] for part in parts)}]
    return [{"type": "text", "name": str(part.get("name") or name), "text": part["text"]} for part in parts]


def _written(where: str, message: Mapping[str, Any], names: dict[str, str]) -> str:
    """The assistant's turn as the model itself would have written it."""
    calls = message.get("tool_calls") or []
    thought = message.get("reasoning_content") or ""
    content = message.get("content")
    if content is None and (calls or thought):
        content = ""
    text = "".join(part["text"] for part in _texts(where, content))
    if not isinstance(thought, str):
        raise UserError(f"{where}: reasoning_content must be a string, got {thought!r:.100}")
    if thought:
        text = f"{THINK}\n{thought}\n{END_THINK}\n\n{text}"
    if not calls:
        return text
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise UserError(f"{where}: tool_calls must be a list, got {calls!r:.100}")
    lines = [_call(f"{where}.tool_calls[{number}]", call, names) for number, call in enumerate(calls)]
    gap = "\n" if text and not text.endswith("\n") else ""
    return f"{text}{gap}{TOOL_CALLS}\n" + "\n".join(lines) + f"\n{END_TOOL_CALLS}"


def _call(where: str, call: object, names: dict[str, str]) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f'{where}: expected {{"id": ..., "function": {{"name": ..., "arguments": ...}}}}, got {call!r:.100}'
        )
    identifier = call.get("id") if isinstance(call, Mapping) else None
    if isinstance(identifier, str):
        names[identifier] = function["name"]
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # broken: the model reads again what it wrote
            arguments = json.loads(arguments)
    try:
        return call_text(function["name"], arguments)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: the arguments are no JSON ({error})") from error
