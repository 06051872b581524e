"""Tools that a model may call: schemas made from Python functions, and what is wrong with the arguments of a call."""

import dataclasses
import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import docstring_parser
import jsonschema
import jsonschema.validators
import pydantic
import referencing
import referencing.exceptions

from m1jax.errors import UserError

_RENAMED = {"dict": "object", "float": "number", "tuple": "array"}
"""Types as BFCL writes them (Python's names), in the words of JSON schema; its "any" is no restriction."""
_HOLD_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_HOLD_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_HOLD_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


@dataclasses.dataclass(frozen=True)
class Tool:
    """One tool: what the model reads of it, and the function behind it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object"""
    function: Callable[..., object] | None = None
    """takes the arguments by name; may be a coroutine function"""

    def __post_init__(self):
        """Raises UserError for a schema that is none."""
        try:
            _validator_class(self.parameters).check_schema(
                self.arguments_schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
        except jsonschema.SchemaError as error:
            place = "".join(f"[{part!r}]" for part in error.absolute_path)
            raise UserError(f"tool {self.name!r}: parameters{place} is no JSON schema: {error.message:.200}") from error
        except RecursionError as error:
            raise UserError(f"tool {self.name!r}: parameters are nested too deeply") from error

    @classmethod
    def of(cls, function: Callable[..., object]) -> "Tool":
        """The tool that a Python function is.

        Type hints become the schema (whatever pydantic understands: lists, literals, enumerations, dataclasses, ...),
        the docstring's text becomes the description, its section on arguments (Google's, NumPy's or Sphinx's style)
        those of the parameters.

        Raises:
            UserError: a parameter that cannot be given by name, or whose type has no JSON schema.
        """
        name, parameters = _signature(function)
        documentation = docstring_parser.parse(inspect.getdoc(function) or "")
        adapters = {p.name: _adapter(name, p.name, annotation) for p, annotation in parameters}
        try:
            schemas, shared = pydantic.TypeAdapter.json_schemas([(key, "validation", a) for key, a in adapters.items()])
        except pydantic.errors.PydanticInvalidForJsonSchema as error:
            raise UserError(f"tool {name!r}: a parameter's type has no JSON schema: {error}") from error
        properties = {key: _without_titles(schemas[key, "validation"]) for key in adapters}
        for described in documentation.params:
            if described.arg_name in properties and described.description:
                properties[described.arg_name].setdefault("description", described.description)
        for parameter, _ in parameters:
            if parameter.default is not parameter.empty:
                default = adapters[parameter.name].dump_python(parameter.default, mode="json", fallback=lambda _: None)
                properties[parameter.name].setdefault("default", default)
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if required := [p.name for p, _ in parameters if p.default is p.empty]:
            schema["required"] = required
        schema["additionalProperties"] = False
        if shared.get("$defs"):
            schema["$defs"] = {key: _without_titles(value) for key, value in shared["$defs"].items()}
        text = "\n\n".join(filter(None, [documentation.short_description, documentation.long_description]))
        return cls(name, text, schema, function)

    @property
    def schema(self) -> dict[str, Any]:
        """What the prompt tells the model about the tool."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """The parameters in JSON schema's own words."""
        return _in_json_schema(self.parameters)

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        """What is wrong with the arguments, by the schema, in words for the model; empty where nothing is."""
        try:
            errors = sorted(self._validator.iter_errors(arguments), key=lambda error: list(map(str, error.path)))
        except (referencing.exceptions.Unresolvable, RecursionError, re.error) as error:
            return [f"the tool's own schema cannot be applied ({type(error).__name__})"]
        return [
            (f"at {'.'.join(map(str, error.absolute_path))}: " if error.absolute_path else "") + f"{error.message:.200}"
            for error in errors
        ]

    @functools.cached_property
    def _validator(self) -> Any:
        # An empty registry: a schema must not make us fetch anything.
        return _validator_class(self.parameters)(self.arguments_schema, registry=referencing.Registry())

    @functools.cached_property
    def _adapters(self) -> dict[str, pydantic.TypeAdapter[Any]]:
        assert self.function is not None
        name, parameters = _signature(self.function)
        return {parameter.name: _adapter(name, parameter.name, annotation) for parameter, annotation in parameters}

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, object]:
        """The arguments as the Python values that the function's type hints ask for.

        Raises:
            ValueError: what the schema cannot express (a validator of one's own, a date that is none).
        """
        adapters = self._adapters
        return {
            key: adapters[key].validate_python(value) if key in adapters else value for key, value in arguments.items()
        }


def as_tools(tools: Sequence[Tool | Callable[..., object] | Mapping[str, Any]]) -> list[Tool]:
    """Functions, tools, and descriptions in JSON (plain, or wrapped as OpenAI does), all as tools.

    Raises:
        UserError: what is none of these, a schema that is none, or two tools of one name.
    """
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise UserError(f"tools: expected a list of functions or objects, got {tools!r:.100}")
    found = [_as_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
    names = [tool.name for tool in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"tools: two of them are called {twice!r}; give them names of their own")
    return found


def _as_tool(where: str, tool: object) -> Tool:
    if isinstance(tool, Tool):
        return tool
    if callable(tool):
        return Tool.of(tool)
    description = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(description, Mapping) or not isinstance(name := description.get("name"), str) or not name:
        raise UserError(
            f'{where}: expected a function or {{"name": ..., "description": ..., "parameters": ...}}, got {tool!r:.100}'
        )
    parameters = description.get("parameters")
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise UserError(f"{where}: parameters must be a JSON schema, an object, got {parameters!r:.100}")
    try:
        json.dumps(parameters)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: parameters are no JSON: {error}") from error
    return Tool(name, str(description.get("description") or ""), parameters)


def _signature(function: Callable[..., object]) -> tuple[str, list[tuple[inspect.Parameter, Any]]]:
    """A function's name, and its parameters with their annotations."""
    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{function!r:.100} has no name that a tool could bear; define it with `def`")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = list(inspect.signature(function).parameters.values())
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"tool {name!r}: its signature cannot be read: {error}") from error
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"tool {name!r}: {parameter} cannot be given by name; write each parameter out")
    return name, [(parameter, hints.get(parameter.name, Any)) for parameter in parameters]


def _adapter(tool: str, name: str, annotation: Any) -> pydantic.TypeAdapter[Any]:
    try:
        return pydantic.TypeAdapter(annotation)
    except (pydantic.errors.PydanticSchemaGenerationError, pydantic.errors.PydanticUndefinedAnnotation) as error:
        raise UserError(f"tool {tool!r}: the type of {name!r} has no JSON schema: {annotation!r:.100}") from error


def _without_titles(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without the titles that pydantic makes of names: they cost tokens and tell the model nothing."""
    return _mapped({key: value for key, value in schema.items() if key != "title"}, _without_titles)


def _in_json_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same schema with BFCL's types renamed, at every depth."""
    found = dict(schema)
    kinds = found.get("type")
    if kinds == "any":
        del found["type"]
    elif isinstance(kinds, str):
        found["type"] = _RENAMED.get(kinds, kinds)
    elif isinstance(kinds, list):
        found["type"] = [_RENAMED.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    return _mapped(found, _in_json_schema)


def _mapped(schema: dict[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """`change` for each schema inside a schema; what only looks like one (defaults, enumerations) stays."""
    found = {}
    for key, value in schema.items():
        if key in _HOLD_SCHEMAS and isinstance(value, Mapping):
            value = {name: change(item) if isinstance(item, Mapping) else item for name, item in value.items()}
        elif key in _HOLD_LISTS and isinstance(value, list | tuple):
            value = [change(item) if isinstance(item, Mapping) else item for item in value]
        elif key in _HOLD_ONE and isinstance(value, Mapping):
            value = change(value)
        found[key] = value
    return found


def _validator_class(schema: Mapping[str, Any]) -> Any:
    return jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
