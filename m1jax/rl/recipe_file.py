"""Recipes as data: a TOML file stands for options, and options that are given beside it win.

    [generation]
    prompts = 512        # --prompts 512
    chat = false         # --no-chat

Tables are those of `RLRecipe`; what is at the top is its own.
"""

import dataclasses
import importlib.resources
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m1jax.errors import UserError
from m1jax.rl.recipe import RLRecipe

OPTION = "--recipe"


def expanded(arguments: Sequence[str]) -> list[str]:
    """Arguments of `train rl`, with the options that their `--recipe FILE` stands for.

    Raises:
        UserError: there is no such recipe, or there are two, or it is no TOML or has a key that is no option.
    """
    names = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    if OPTION not in names:
        return list(arguments)
    if names.count(OPTION) > 1:
        raise UserError(f"{OPTION} is given {names.count(OPTION)} times; put the options into one file")
    at = names.index(OPTION)
    _, equals, name = arguments[at].partition("=")
    if not equals:
        if at + 1 >= len(arguments):
            raise UserError(f"{OPTION}: give a file, or one of {', '.join(known())}")
        name = arguments[at + 1]
    given = {option.removeprefix("--no-").removeprefix("--") for option in names if option.startswith("--")}
    options = [option for key, value in read(name).items() if key not in given for option in _spelt(key, value)]
    return [*arguments, *options]


def known() -> list[str]:
    """Recipes that come along."""
    return sorted(file.name.removesuffix(".toml") for file in _shipped().iterdir() if file.name.endswith(".toml"))


def read(name: str) -> dict[str, Any]:
    """Option -> value, of a file or of a recipe that comes along.

    Raises:
        UserError: as in `expanded`.
    """
    if name in known():
        content = (_shipped() / f"{name}.toml").read_bytes()
    elif Path(name).is_file():
        content = _content(Path(name))
    else:
        raise UserError(f"{OPTION} {name}: no such file; recipes that come along: {', '.join(known())}")
    try:
        found = tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{OPTION} {name}: it is not text in UTF-8 (byte {error.start}); save it as such") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{OPTION} {name}: {error}") from error
    return _flat(found, RLRecipe, name, "")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{OPTION} {path}: {error.strerror}") from error


def _flat(table: Mapping[str, Any], recipe: type, name: str, at: str) -> dict[str, Any]:
    types = typing.get_type_hints(recipe)
    fields = {field.name: types[field.name] for field in dataclasses.fields(recipe)}
    options: dict[str, Any] = {}
    for key, value in table.items():
        kind = fields.get(key)
        if kind is None or dataclasses.is_dataclass(kind) != isinstance(value, dict):
            raise UserError(f"{OPTION} {name}: {at}{key} is no {'table' if isinstance(value, dict) else 'option'} here")
        if isinstance(value, dict):
            assert isinstance(kind, type)
            options |= _flat(value, kind, name, f"{key}.")
        else:
            options[key.replace("_", "-")] = value
    return options


def _spelt(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", *map(str, value if isinstance(value, list) else [value])]


def _shipped() -> Any:
    return importlib.resources.files("m1jax.rl") / "recipes"
