"""What the model wrote, taken apart: its thought, its answer, its calls. Whole, or piece by piece as it comes.

The model writes `<think>...</think>`, its answer, and `<tool_calls>` with one JSON object a line. What counts:

* `<think>` opens a thought wherever it stands outside of a call; one that is never closed reaches to the end. A thought
  is text: calls in it are never made.
* A call counts if its JSON object is complete, though its block may not be. Objects may span lines and stand in arrays,
  several in a line; the arguments may be an object or a string that holds one. A closing tag inside a string is text.
* What is no JSON object is reported, to the end of its line. Where an object breaks and a tag stands in its strings,
  nobody can tell what was meant: what follows is text, and no call.
* White space next to a tag belongs to the tag. Texts that a tag separates are joined by a line break.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from m1jax.chat.tokens import END_THINK, END_TOOL_CALLS, THINK, TOOL_CALLS
from m1jax.chat.tools import Tool, as_tools
from m1jax.errors import shortened

Json = Any
"""a value as `json.loads` makes it"""

_BETWEEN = re.compile(r"[\s,\[\]]*")
_FENCE = re.compile(r"\s*```\w*\s*")
_OUTSIDE = re.compile(rf'["{{}}]|{END_TOOL_CALLS}')
_INSIDE = re.compile(r'["\\]')
_MOST_PROBLEMS = 5


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call to be made: the tool exists, and the arguments fit its schema."""

    name: str
    arguments: dict[str, Json]


@dataclasses.dataclass(frozen=True)
class CallError:
    """A call that cannot be made."""

    name: str
    """of the tool as the model wrote it; "" where there is none"""
    text: str
    """what the model wrote"""
    message: str
    """what is wrong with it, for the model to read"""


@dataclasses.dataclass(frozen=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """A piece of the thought."""

    text: str


Event = Content | Reasoning | ToolCall | CallError


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn of the assistant, taken apart."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    errors: tuple[CallError, ...] = ()
    """calls that cannot be made, each with a message for the model"""


def parse_message(
    text: str, tools: Sequence[Tool | Callable[..., object] | Mapping[str, Any]] | None = None
) -> Message:
    """Takes apart what the model wrote.

    Args:
        text: the turn without its end token.
        tools: what may be called: functions, tools or descriptions in JSON. Without any list, `<tool_calls>` is text.

    Raises:
        UserError: something wrong with the tools. Nothing in the text raises.
    """
    parser = StreamParser(tools)
    parser.feed(text)
    parser.close()
    return parser.message


class StreamParser:
    """`parse_message` for a text that comes in pieces; however it is cut, the message is the same.

    The texts of the events are together those of the message, and nothing that was given out is taken back.
    """

    def __init__(self, tools: Sequence[Tool | Callable[..., object] | Mapping[str, Any]] | None = None):
        """Raises UserError for something wrong with the tools; see `parse_message`."""
        self._tools = None if tools is None else {tool.name: tool for tool in as_tools(tools)}
        self._calling = tools is not None  # whether `<tool_calls>` means anything (still)
        self._buffer = ""
        self._state = self._in_content
        self._after_thought = self._in_content
        self._content = _Text()
        self._reasoning = _Text()
        self._calls: list[ToolCall] = []
        self._errors: list[CallError] = []
        self._found_before_block = 0
        self._scanned = 0  # of the object at the front of the buffer
        self._depth = 0
        self._in_string = False
        self._events: list[Event] = []

    @property
    def message(self) -> Message:
        """What has been read so far."""
        return Message(
            "".join(self._content.pieces), "".join(self._reasoning.pieces), tuple(self._calls), tuple(self._errors)
        )

    def feed(self, text: str) -> list[Event]:
        """Reads on, and returns what this has brought, in order."""
        return self._read(text, last=False)

    def close(self) -> list[Event]:
        """The text is at its end; returns what was kept back."""
        events = self._read("", last=True)
        for kind, text in ((Reasoning, self._reasoning.close()), (Content, self._content.close())):
            if text:
                events.append(kind(text))
        return events

    def _read(self, text: str, last: bool) -> list[Event]:
        self._buffer += text
        self._events = []
        while self._state(last):
            pass
        return self._events

    # The states. Each takes from the front of the buffer and says whether it got on; if not, it needs more text. What
    # it does must not depend on where the text was cut: it waits where a longer text could be read in another way.

    def _in_content(self, last: bool) -> bool:
        text, tag = self._take_until((THINK, TOOL_CALLS) if self._calling else (THINK,), last)
        self._add(Content, self._content.write(text))
        if not tag:
            return False
        self._content.border()
        if tag == THINK:
            self._open_thought(self._in_content)
        else:
            self._found_before_block = len(self._calls) + len(self._errors)
            self._state = self._in_block
        return True

    def _open_thought(self, then: Callable[[bool], bool]) -> None:
        self._reasoning.border()
        self._state, self._after_thought = self._in_thought, then

    def _in_thought(self, last: bool) -> bool:
        text, tag = self._take_until((END_THINK,), last)
        self._add(Reasoning, self._reasoning.write(text))
        if not tag:
            return False
        self._reasoning.border()
        self._state = self._after_thought
        return True

    def _in_block(self, last: bool) -> bool:
        """Between the objects of a block."""
        self._buffer = self._buffer[_BETWEEN.match(self._buffer).end() :]  # pyright: ignore[reportOptionalMemberAccess]
        text = self._buffer
        if text.startswith(THINK):
            self._buffer = text.removeprefix(THINK)
            self._open_thought(self._in_block)
        elif text.startswith(END_TOOL_CALLS):
            self._buffer = text.removeprefix(END_TOOL_CALLS)
            self._close_block()
        elif any(tag.startswith(text) for tag in (THINK, END_TOOL_CALLS)):  # also nothing at all
            if not last:
                return False
            self._buffer = ""
            self._close_block()
        elif text.startswith("{"):
            self._scanned, self._depth, self._in_string = 0, 0, False
            self._state = self._in_object
        else:
            self._state = self._in_junk
        return True

    def _close_block(self) -> None:
        if len(self._calls) + len(self._errors) == self._found_before_block:
            self._fail("", "", f"There is no call between {TOOL_CALLS} and {END_TOOL_CALLS}.")
        self._state = self._in_content

    def _in_junk(self, last: bool) -> bool:
        text, found = self._take_line(last)
        if found and not _FENCE.fullmatch(text):
            self._fail("", text, "This is no JSON object with a name and arguments; write one object a line.")
        return found

    def _after_broken(self, last: bool) -> bool:
        return self._take_line(last)[1]  # what follows in its line belongs to the broken object

    def _take_line(self, last: bool) -> tuple[str, bool]:
        """The rest of the line up to a tag, and whether its end has come."""
        ends = [i for mark in ("\n", THINK, END_TOOL_CALLS) if (i := self._buffer.find(mark)) >= 0]
        if not ends and not last:
            return "", False
        end = min(ends, default=len(self._buffer))
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        self._state = self._in_block
        return text, True

    def _in_object(self, last: bool) -> bool:
        """Inside of an object: looks for its end."""
        text = self._buffer
        while True:
            match = (_INSIDE if self._in_string else _OUTSIDE).search(text, self._scanned)
            if match is None:
                # A closing tag may have begun; letters of it are nothing that is looked for.
                self._scanned = max(self._scanned, len(text) - len(END_TOOL_CALLS) + 1)
                break
            mark, self._scanned = match[0], match.end()
            if mark == "\\":
                if self._scanned == len(text):
                    self._scanned = match.start()  # what it escapes is still to come
                    break
                self._scanned += 1
            elif mark == '"':
                self._in_string = not self._in_string
            elif mark == END_TOOL_CALLS:
                self._broken(match.start(), "it breaks off")
                return True
            else:
                self._depth += 1 if mark == "{" else -1
                if self._depth == 0:
                    self._complete(match.end())
                    return True
        if last:
            self._broken(len(text), "it breaks off")
        return last

    def _complete(self, end: int) -> None:
        try:
            value = _loads(self._buffer[:end])
        except (ValueError, RecursionError) as error:
            self._broken(end, str(error) or "it is nested too deeply")
            return
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        self._state = self._in_block
        call = self._checked(text, value)
        if isinstance(call, ToolCall):
            self._calls.append(call)
        else:
            self._errors.append(call)
        self._events.append(call)

    def _broken(self, end: int, why: str) -> None:
        text = self._buffer[:end]
        swallowed = [i for tag in (THINK, END_TOOL_CALLS) if (i := text.find(tag)) >= 0]
        end = min([end, *swallowed])
        text, self._buffer = text[:end], self._buffer[end:]
        self._fail(_name_in(text), text, f"The JSON of this call is broken ({why:.200}); no call was made of it.")
        if swallowed:
            self._calling = False
            self._buffer = self._buffer.removeprefix(END_TOOL_CALLS)
            self._state = self._in_content
        else:
            self._state = self._after_broken

    def _checked(self, text: str, value: dict[str, Json]) -> ToolCall | CallError:
        tools = self._tools or {}
        name, arguments = value.get("name"), value.get("arguments")
        if not isinstance(name, str):
            return CallError("", text, 'The call has no "name"; write {"name": ..., "arguments": {...}}.')
        if name not in tools:
            known = f"The tools are: {', '.join(tools)}." if tools else "There are no tools."
            return CallError(name, text, f"There is no tool {json.dumps(name, ensure_ascii=False):.100}. {known}")
        if isinstance(arguments, str):
            try:
                arguments = _loads(arguments)
            except (ValueError, RecursionError) as error:
                return CallError(name, text, f'"arguments" is a text that is no JSON ({error!s:.200}).')
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            return CallError(name, text, f'"arguments" must be a JSON object, not {json.dumps(arguments):.100}.')
        if problems := tools[name].problems(arguments):
            told = shortened(problems, _MOST_PROBLEMS)
            return CallError(name, text, f"The arguments do not fit the tool's schema: {told}.")
        return ToolCall(name, arguments)

    def _fail(self, name: str, text: str, message: str) -> None:
        error = CallError(name, text, message)
        self._errors.append(error)
        self._events.append(error)

    def _add(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        if text:
            self._events.append(kind(text))

    def _take_until(self, tags: Sequence[str], last: bool) -> tuple[str, str]:
        """The text before the first of the tags, and that tag, both taken from the buffer. Without one, all but what
        may be its beginning, and ""."""
        found = [(i, tag) for tag in tags if (i := self._buffer.find(tag)) >= 0]
        if found:
            end, tag = min(found)
            text, self._buffer = self._buffer[:end], self._buffer[end + len(tag) :]
            return text, tag
        end = len(self._buffer)
        if not last:
            start = max(0, end - max(map(len, tags)) + 1)
            i = self._buffer.find("<", start)
            while i >= 0 and not any(tag.startswith(self._buffer[i:]) for tag in tags):
                i = self._buffer.find("<", i + 1)
            end = i if i >= 0 else end
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return text, ""


class _Text:
    """A text that comes in pieces between tags, without the white space that borders on those."""

    def __init__(self):
        self.pieces: list[str] = []
        self._held = ""  # white space that a tag may follow
        self._after_tag = False

    def write(self, text: str) -> str:
        """Adds to the text; returns what is certain of it by now."""
        if self._after_tag:
            text = text.lstrip()
            if not text:
                return ""
            self._after_tag = False
            text = "\n" + text if self.pieces else text
        text = self._held + text
        new = text.rstrip()
        self._held = text[len(new) :]
        return self._give(new)

    def border(self) -> None:
        """A tag stands here."""
        self._held, self._after_tag = "", True

    def close(self) -> str:
        """The text is at its end; returns what was kept back."""
        new, self._held = self._held, ""
        return self._give(new)

    def _give(self, text: str) -> str:
        if text:
            self.pieces.append(text)
        return text


def _loads(text: str) -> Json:
    """Raises ValueError for what is no JSON that every reader takes: infinities, half letters, numbers without end."""
    # strict=False: line breaks in strings, as models write them in code
    value = json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.40} is too large a number")
    return number


def _name_in(text: str) -> str:
    """The tool that a broken call names, as far as one can tell."""
    match = re.match(r'\{\s*"name"\s*:\s*"([^"\\]*)"', text)
    return match[1] if match else ""
