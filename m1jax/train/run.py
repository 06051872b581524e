"""A run's directory: what was asked for, what was measured, where to go on."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m1jax import processes
from m1jax.disk import Lock, explained, write_atomically, writing
from m1jax.errors import UserError
from m1jax.train.metrics import MetricsLog


class Run:
    """`runs/<name>/`, new or to be continued.

    Args:
        directory: made if missing.
        settings: everything that decides the result (configuration and seeds), as dataclasses, dicts and numbers; kept
            in `config.json`.

    Raises:
        UserError: the directory holds a model or checkpoints of a run with other settings, another process trains in
            it, or it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.directory = Path(directory)
        failure: UserError | None = None
        if processes.writes():
            try:
                self._lock = self._open(json.dumps(_plain(settings), indent=2) + "\n")
            except UserError as error:
                failure = error
            except OSError as error:
                failure = explained(error, self.directory)
        processes.raise_together(failure, f"{directory}: process 0 could not begin the run; see there")
        self.log = MetricsLog(self.directory, writes=processes.writes())

    def _open(self, text: str) -> Lock:
        file = self.directory / "config.json"
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            there = json.loads(file.read_text()) if file.exists() else None
        except ValueError as error:
            raise UserError(f"{file}: {error}; choose another name for the run, or remove {self.directory}") from error
        if isinstance(there, dict) and "model_type" in there:
            raise UserError(
                f"{self.directory} holds a model, whose config.json a run would replace; choose another name"
            )
        lock = Lock(self.directory)
        # Before its first checkpoint a run has nothing to go on with: it may be started anew, with other settings.
        if there is not None and any((self.directory / "checkpoints").glob("*/*")):
            _compare(there, json.loads(text), file)
        else:
            write_atomically(file, text)
        return lock

    def checkpoints_of(self, phase: str) -> Path:
        """Where the checkpoints of a phase are. The directory is made, so that it is noticed if it goes away."""
        directory = self.directory / "checkpoints" / phase
        if processes.writes():
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
        return directory


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _compare(old: Any, new: Any, file: Path) -> None:
    """Raises where the settings differ, naming the first difference."""

    def differences(old: Any, new: Any, at: str) -> list[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted(old.keys() | new.keys())
            return [d for key in keys for d in differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
        return [] if old == new else [f"{at} is {old!r} there and {new!r} now"]

    found = differences(old, new, "")
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{file}: a run with other settings: {found[0]}{more}; choose another name, or remove the run")
