"""The figures of a run on Weights & Biases (extra `wandb`), where they are asked for.

metrics.jsonl stays the truth: what a resumed run measures again is sent again, at the same steps.
"""

import importlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from m1jax.errors import UserError


class WandB:
    """One run there, the same one when the run goes on here.

    Args:
        project: its project.
        directory: of the run; its files go below `wandb/` in it.
        settings: as JSON can hold them.

    Raises:
        UserError: the library is not installed, or does not begin (not logged in, no connection).
    """

    def __init__(self, project: str, directory: Path, settings: Mapping[str, object]):
        try:
            library: ModuleType = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError("--wandb: wandb is not installed: pip install 'm1jax[wandb]'") from error
        name = directory.name
        try:
            self._run = library.init(
                project=project,
                name=name,
                id=f"{name}-{zlib.crc32(str(directory.absolute()).encode()):08x}",
                resume="allow",
                dir=str(directory),
                config=dict(settings),
            )
        except Exception as error:  # the library's own, of many kinds
            raise UserError(
                f"--wandb {project}: it does not begin ({str(error).splitlines()[0]:.200}); log in (wandb login), or "
                "set WANDB_MODE=offline"
            ) from error
        self._phases: set[str] = set()

    def add(self, phase: str, step: int, values: Mapping[str, object]) -> None:
        """The numbers of a record."""
        if phase not in self._phases:  # records of several trainings count their steps each for itself
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        numbers = {f"{phase}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        self._run.log({f"{phase}/step": step, **numbers})

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()
