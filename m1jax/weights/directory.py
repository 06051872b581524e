"""A model's directory of Hugging Face files: its config, what else belongs to it, and how it comes to its place."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from m1jax.config import ModelConfig
from m1jax.disk import put_in_place, writing
from m1jax.errors import UserError
from m1jax.weights.names import tensors, transformers_merged
from m1jax.weights.safetensors import INDEX, Weights, compare, read_json, unmerged

CONFIG = "config.json"
# What belongs to the tokenizer and to generation, copied from one directory to another as it is.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def read_config(directory: Path) -> ModelConfig:
    """The config of a directory of Hugging Face files; UserError names the file where something is wrong."""
    values = read_json(directory / CONFIG)
    try:
        return ModelConfig.from_hf(values)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error


def open_weights(directory: Path, config: ModelConfig) -> Weights:
    """The official tensors of a directory, all there with the shapes of the config, or a UserError."""
    weights = Weights(directory)
    weights.entries = unmerged(weights.entries, transformers_merged(config))
    expected = {tensor.name: tensor.shape for tensor in tensors(config)}
    compare(directory, {name: entry.shape for name, entry in weights.entries.items()}, expected)
    weights.entries = {name: weights.entries[name] for name in expected}
    return weights


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer's files that are there."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A sibling to write into, renamed to ``directory`` at the end; removed if that is not reached."""
    directory = directory.resolve()
    check_replaceable(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial):
        partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_replaceable(directory: Path) -> None:
    """Raises UserError where writing to ``directory`` would remove something that is no export of a model."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give the name of a new directory")
    if directory.is_mount():  # cannot be renamed
        raise UserError(f"{directory} is where a disk is mounted; give the name of a new directory on it")
    there = list(directory.iterdir()) if directory.is_dir() else []
    if not there:
        return
    others = sorted(path.name for path in there if not _is_exported(path))
    try:
        read_config(directory)
    except UserError:  # a run has a config.json too, and so has any other model
        others = others or [CONFIG]
    if others:
        raise UserError(
            f"{directory} holds something else than a model's export ({others[0]}); give the name of a new directory"
        )


def _is_exported(path: Path) -> bool:
    return path.is_file() and (path.name in (CONFIG, INDEX, *COMPANIONS) or path.suffix == ".safetensors")
