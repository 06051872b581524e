"""Schemas from functions, and arguments against schemas."""

import dataclasses
import datetime
import enum
import io
import urllib.request
from typing import Annotated, Literal

import pydantic
import pytest

from m1jax.chat import Tool, as_tools
from m1jax.errors import UserError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


def paint(
    at: Point,
    colour: Colour,
    words: list[str],
    *,
    mode: Literal["fast", "slow"] = "fast",
    day: datetime.date | None = None,
    title: Annotated[str, pydantic.Field(max_length=5)] = "",
    schema=None,
) -> str:
    """Paints a point.

    It takes a while.

    Args:
        at: where
        words: what to write
            below it
        title: a short one
    """
    return ""


def test_a_function_becomes_a_schema():
    tool = Tool.of(paint)
    assert (tool.name, tool.description) == ("paint", "Paints a point.\n\nIt takes a while.")
    assert tool.schema == {
        "name": "paint",
        "description": "Paints a point.\n\nIt takes a while.",
        "parameters": {
            "type": "object",
            "properties": {
                "at": {"$ref": "#/$defs/Point", "description": "where"},
                "colour": {"$ref": "#/$defs/Colour"},
                "words": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "what to write\nbelow it",
                },
                "mode": {"type": "string", "enum": ["fast", "slow"], "default": "fast"},
                "day": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None},
                "title": {"type": "string", "maxLength": 5, "description": "a short one", "default": ""},
                "schema": {"default": None},
            },
            "required": ["at", "colour", "words"],
            "additionalProperties": False,
            "$defs": {
                "Colour": {"type": "string", "enum": ["red", "blue"]},
                "Point": {
                    "type": "object",
                    "properties": {"x": {"type": "integer"}, "y": {"type": "number", "default": 0.0}},
                    "required": ["x"],
                },
            },
        },
    }


def test_arguments_become_what_the_hints_ask_for():
    arguments = {"at": {"x": 1.0}, "colour": "red", "words": ["a"], "day": "2024-02-29", "schema": [1]}
    tool = Tool.of(paint)
    assert tool.problems(arguments) == []
    assert tool.bind(arguments) == {
        "at": Point(1),
        "colour": Colour.RED,
        "words": ["a"],
        "day": datetime.date(2024, 2, 29),
        "schema": [1],
    }
    with pytest.raises(ValueError, match="date"):  # which a schema's format does not enforce
        tool.bind({**arguments, "day": "2024-02-30"})


def test_problems_are_named_with_their_place():
    problems = Tool.of(paint).problems({"at": {"y": 1}, "colour": "green", "words": ["a", 1], "size": 2})
    assert problems == [
        "Additional properties are not allowed ('size' was unexpected)",
        "at at: 'x' is a required property",
        "at colour: 'green' is not one of ['red', 'blue']",
        "at words.1: 1 is not of type 'string'",
    ]


def test_methods_coroutines_and_functions_without_hints():
    class Shop:
        async def buy(self, what, count: int = 1):
            pass

    tool = Tool.of(Shop().buy)
    assert tool.schema == {
        "name": "buy",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"what": {}, "count": {"type": "integer", "default": 1}},
            "required": ["what"],
            "additionalProperties": False,
        },
    }


def test_descriptions_in_json():
    plain = {"name": "a.b", "description": "d", "parameters": {"type": "object", "properties": {"x": {}}}}
    wrapped = {"type": "function", "function": plain}
    assert as_tools([plain]) == as_tools([wrapped])
    assert as_tools([plain])[0].schema == plain
    assert as_tools([{"name": "f"}])[0].parameters == {"type": "object", "properties": {}}


def test_types_as_bfcl_writes_them():
    """They stand in the prompt as they were given, and are understood in checking."""
    properties = {
        "type": {"type": "dict", "properties": {"x": {"type": "float"}}},
        "pair": {"type": "tuple", "items": {"type": "dict"}},
        "free": {"type": "any", "default": {"type": "dict"}},
        "maybe": {"type": ["dict", "null"]},
    }
    parameters = {"type": "dict", "properties": properties, "required": ["type"]}
    (tool,) = as_tools([{"name": "f", "parameters": parameters}])
    assert tool.schema["parameters"] == parameters
    assert tool.problems({"type": {"x": 1.5}, "pair": [{}], "free": 3, "maybe": None}) == []
    assert len(tool.problems({"type": {"x": "1"}, "pair": [1], "maybe": 2})) == 3
    assert tool.problems({}) == ["'type' is a required property"]


def test_a_schema_makes_nobody_fetch_anything(monkeypatch):
    def fetch(*arguments, **options):
        raise AssertionError("fetched")

    monkeypatch.setattr(urllib.request, "urlopen", fetch)
    for reference in ("http://example.com/schema.json", "file:///etc/passwd", "#/nowhere"):
        (tool,) = as_tools([{"name": "f", "parameters": {"$ref": reference}}])
        assert "cannot be applied" in tool.problems({})[0]


def gives_anything(*things: int):
    pass


def takes_a_file(file: io.TextIOBase):
    pass


def takes_a_name(name: "Unknown"):  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
    pass


def takes_a_key(key: object, /):
    pass


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("ab", "tools: expected a list"),
        ([5], r"tools\[0\]: expected a function"),
        ([{}], r"tools\[0\]: expected a function"),
        ([{"name": ""}], r"tools\[0\]: expected a function"),
        ([{"name": "f", "parameters": 5}], r"tools\[0\]: parameters must be a JSON schema"),
        ([{"name": "f", "parameters": {"type": "strange"}}], r"tool 'f': parameters\['type'\] is no JSON schema"),
        ([{"name": "f", "parameters": {"pattern": "("}}], r"tool 'f': parameters\['pattern'\] is no JSON schema"),
        ([{"name": "f", "parameters": {"a": {1}}}], "no JSON"),
        ([{"name": "f"}, {"name": "f"}], "two of them are called 'f'"),
        ([lambda x: x], "no name"),
        ([gives_anything], r"'gives_anything': \*things: int cannot be given by name"),
        ([takes_a_key], "key: object cannot be given by name"),
        ([takes_a_file], "the type of 'file' has no JSON schema"),
        ([takes_a_name], "signature cannot be read"),
    ],
)
def test_what_is_no_tool(tools, says):
    with pytest.raises(UserError, match=says):
        as_tools(tools)
