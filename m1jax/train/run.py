"""A run's directory: what was asked for, what was measured, where to go on."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from m1jax import processes
from m1jax.disk import Lock, explained, write_atomically, writing
from m1jax.errors import UserError
from m1jax.train.metrics import MetricsLog
from m1jax.train.wandb import WandB

T = TypeVar("T")


_FREE = "cannot change the result"


def free(default: T) -> T:
    """The default of an option that cannot change what a run ends in, but for rounding: it may be another one when the
    run goes on."""
    return dataclasses.field(default=default, metadata={_FREE: True})


def run_directory(runs: Path, name: str) -> Path:
    """RUNS/NAME; raises UserError for a name that is none, or leads somewhere else."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or name != name.strip():
        raise UserError(f"name {name!r}: a run needs a name of its own below {runs}/, for example --name first")
    return runs / name


class Branch(NamedTuple):
    """Where a run begins that goes on from another one's checkpoint."""

    run: Path
    step: int | None
    """None: its newest"""

    @classmethod
    def parse(cls, text: str) -> "Branch":
        """RUN or RUN:STEP; raises UserError where there is no such run."""
        name, _, step = text.rpartition(":")
        branch = cls(Path(name), int(step)) if name and step.isdecimal() else cls(Path(text), None)
        if not (branch.run / "checkpoints").is_dir():
            raise UserError(f"--from {text}: {branch.run} holds no checkpoints; give a run, RUN or RUN:STEP")
        return branch


class Run:
    """`runs/<name>/`, new or to be continued.

    Args:
        directory: made if missing.
        settings: everything that decides the result (configuration and seeds), as dataclasses, dicts and numbers; kept
            in `config.json`. Of a run that goes on, only fields that are `free` may differ, and how a path is spelt.
        branch: where it begins, if it is not from the beginning.
        wandb: a project of Weights & Biases, where its figures go too.

    Raises:
        UserError: the directory holds a model or checkpoints of a run with other settings, another process trains in
            it, or it cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: Mapping[str, object],
        *,
        branch: Branch | None = None,
        wandb: str | None = None,
    ):
        self.directory, self.branch = Path(directory), branch
        if branch is not None:
            settings = {**settings, "from": [branch.run, branch.step]}
        self._wandb: WandB | None = None
        failure: UserError | None = None
        if processes.writes():
            try:
                self._lock = self._open(settings)
                if wandb is not None:
                    self._wandb = WandB(wandb, self.directory, plain(settings))
            except UserError as error:
                failure = error
            except OSError as error:
                failure = explained(error, self.directory)
        processes.raise_together(failure, f"{directory}: process 0 could not begin the run; see there")
        self.log = MetricsLog(self.directory, writes=processes.writes())

    def _open(self, settings: Mapping[str, object]) -> Lock:
        file = self.directory / "config.json"
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            there = json.loads(file.read_text()) if file.exists() else None
        except ValueError as error:
            raise UserError(
                f"{file} is damaged ({error}); remove that file to go on with the options given now"
            ) from error
        if isinstance(there, dict) and "model_type" in there:
            raise UserError(
                f"{self.directory} holds a model, whose config.json a run would replace; choose another name"
            )
        lock = Lock(self.directory)
        # Before its first checkpoint a run has nothing to go on with: it may be started anew, with other settings.
        if there is not None and any((self.directory / "checkpoints").glob("*/*")):
            _compare(there, settings, file)
        write_atomically(file, json.dumps(plain(settings), indent=2) + "\n")
        return lock

    def record(self, phase: str, step: int, values: Mapping[str, object]) -> None:
        """A line of metrics.jsonl, on disk when this returns, and wherever else figures go."""
        self.log.append(phase, step, values)
        if self._wandb is not None:
            self._wandb.add(phase, step, values)

    def close(self) -> None:
        """To be called when nothing more will be recorded."""
        self.log.close()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def checkpoints_of(self, phase: str) -> Path:
        """Where the checkpoints of a phase are. The directory is made, so that it is noticed if it goes away."""
        directory = self.directory / "checkpoints" / phase
        if processes.writes():
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
        return directory


def plain(value: object) -> Any:
    """As JSON can hold it; paths as they are found from anywhere."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return os.path.abspath(value) if isinstance(value, os.PathLike) else value


def _compare(old: Mapping[str, object], new: Mapping[str, object], file: Path) -> None:
    """Raises where settings differ that decide the result, naming the first difference."""
    found = list(_differences(old, new, ""))
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{file}: a run with other settings: {found[0]}{more}; choose another name, or remove the run")


def _differences(old: object, new: object, at: str) -> Iterator[str]:
    if dataclasses.is_dataclass(new) and not isinstance(new, type):
        ignored = {field.name for field in dataclasses.fields(new) if _FREE in field.metadata}
        new = {field.name: getattr(new, field.name) for field in dataclasses.fields(new) if field.name not in ignored}
        if isinstance(old, dict):
            old = {key: value for key, value in old.items() if key not in ignored}
    if isinstance(old, dict) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif isinstance(old, list) and isinstance(new, list | tuple) and len(old) == len(new):
        for number, (before, now) in enumerate(zip(old, new)):
            yield from _differences(before, now, f"{at}[{number}]")
    elif isinstance(old, str) and isinstance(new, os.PathLike):
        if Path(old).resolve() != Path(new).resolve():
            yield f"{at} is {old!r} there and {os.fspath(new)!r} now"
    elif old != plain(new):
        yield f"{at} is {old!r} there and {plain(new)!r} now"
