"""A model's directory of Hugging Face files: its config, what else belongs to it, and how it comes to its place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from m1jax.config import ModelConfig
from m1jax.disk import put_in_place, writing
from m1jax.errors import UserError
from m1jax.weights.names import tensors, transformers_merged
from m1jax.weights.safetensors import INDEX, Weights, compare, read_json, unmerged

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
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
    GENERATION_CONFIG,
)
# What tells a checkpoint, and where a run keeps its checkpoints (by phase) and the model it ends with.
MANIFEST = "checkpoint.json"
CHECKPOINTS, EXPORT = "checkpoints", "export"


def locate(path: str | os.PathLike[str]) -> Path:
    """The directory of model files that a path means: itself, or the export of the run that it is.

    A path that is neither comes back as it is; who reads it will say what is wrong.

    Raises:
        UserError: it is a run without an export, or checkpoints: names what there is to give or to do instead.
    """
    path = Path(path)
    if is_model(path):
        return path
    if (path / CHECKPOINTS).is_dir():
        if is_model(path / EXPORT):
            return path / EXPORT
        raise UserError(f"{path} is a run that has not exported its model yet; {_advice(path)}")
    if holds_checkpoints(path):
        run = run_of(path)
        if run is not None and is_model(run / EXPORT):
            raise UserError(f"{path} holds checkpoints, no model's files; give {run / EXPORT}, or {_advice(path)}")
        raise UserError(f"{path} holds checkpoints, no model's files; {_advice(path)}")
    return path


def is_model(path: Path) -> bool:
    """Whether a directory says that it is a model, of whatever kind; a run has a config.json too."""
    try:
        return "model_type" in read_json(path / CONFIG)
    except UserError:
        return False


def holds_checkpoints(path: Path) -> bool:
    """Whether this is a checkpoint, a directory of some, all of a run's, or the run."""
    below = ("", "*/", "*/*/", f"{CHECKPOINTS}/*/", f"{CHECKPOINTS}/*/*/")
    return any(any(path.glob(f"{place}{MANIFEST}")) for place in below)


def run_of(path: Path) -> Path | None:
    """The run that a directory belongs to, from its place within `checkpoints/`; None if it is not in one."""
    path = path.absolute()
    within = next((place for place in (path, *path.parents[:2]) if place.name == CHECKPOINTS), None)
    return within.parent if within is not None else None


def _advice(path: Path) -> str:
    return f"`m1jax convert {path} DIRECTORY` makes a model's files of the newest checkpoint"


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


def name_end_token(directory: Path) -> None:
    """Writes a generation_config.json that names the tokens a text begins and ends with, where there is none.

    Without it Transformers would generate on and on. Nothing is written beside a tokenizer of another kind, or none.
    """
    from m1jax.chat import Tokenizer  # `m1jax --help` need not wait for its library

    if (directory / GENERATION_CONFIG).exists() or not (directory / "tokenizer.json").exists():
        return
    try:
        tokenizer = Tokenizer.from_dir(directory)
    except UserError:
        return
    values = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    (directory / GENERATION_CONFIG).write_text(json.dumps(values, indent=2) + "\n")


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
