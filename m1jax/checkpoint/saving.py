"""Writing a checkpoint: beside its place, in the background, by all processes; renamed when it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m1jax import processes
from m1jax.checkpoint.manifest import (
    ARRAYS,
    FORMAT,
    PARTIAL,
    REPLACED,
    TREE,
    checksums,
    jsonable,
    list_steps,
    listed,
    write_values,
)
from m1jax.checkpoint.options import context
from m1jax.checkpoint.trees import flat, named, unstacked
from m1jax.config import ModelConfig
from m1jax.disk import FULL, NOT_PERMITTED, Place, sync
from m1jax.errors import UserError

OTHERS_TIMEOUT = 1800  # seconds that process 0 waits for the checksums of the others, and they for its rename


class Saver:
    """Saves the checkpoints of one directory, one at a time, and prunes those that are no longer kept.

    Args:
        directory, config, keep, asynchronous: as for `Checkpoints`.
        best: the step to keep beside the newest ones, or None.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, keep: int, best: Callable[[], int | None], asynchronous: bool
    ) -> None:
        self.directory, self.config, self.keep = directory, config, keep
        self.best, self.asynchronous = best, asynchronous
        self._place = Place(directory) if directory.is_dir() else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        params: Any,
        state: Any,
        arrays: Mapping[str, Any] | None,
        meta: Any,
        metrics: Mapping[str, float] | None,
    ) -> None:
        """See `Checkpoints.save`."""
        import orbax.checkpoint.experimental.v1 as ocp

        self.wait()
        trees: dict[str, dict[str, Any]] = {}
        if params is not None:
            trees["params"] = unstacked(params, self.config)
        keys: dict[str, str] = {}
        if state is not None:
            trees["state"], keys = named(state)
        host = {name: np.array(value) for name, value in flat(arrays or {})}
        manifest = {
            "format": FORMAT,
            "step": step,
            "saved": time.time(),
            "config": jsonable(self.config),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "meta": meta,
            "params": {name: [str(x.dtype), list(x.shape)] for name, x in trees.get("params", {}).items()},
            "state": {name: [str(x.dtype), list(x.shape)] for name, x in trees.get("state", {}).items()},
            "keys": keys,
            "arrays": {name: [str(x.dtype), list(x.shape)] for name, x in host.items()},
        }
        json.dumps(manifest)  # a meta that JSON cannot hold fails here and not in the background
        # Orbax refuses arrays without elements; their dtype and shape in the manifest are all there is to them.
        trees = {kind: {name: x for name, x in tree.items() if x.size} for kind, tree in trees.items()}
        trees = {kind: tree for kind, tree in trees.items() if tree}

        partial = self.directory / f"{step}{PARTIAL}"
        size = sum(x.nbytes for tree in (*trees.values(), host) for x in tree.values())
        failure: BaseException | None = None
        if processes.writes():
            try:
                if self._place is None:
                    self.directory.mkdir(parents=True, exist_ok=True)
                    self._place = Place(self.directory)
                self._place.check()
                self._clean()
                self._check_space(step, size)
                partial.mkdir()
            except (OSError, UserError) as error:
                failure = self._explained(error, step)
        processes.raise_together(
            failure, f"{self.directory}: process 0 could not begin the checkpoint of step {step}; see there"
        )
        response = None
        if trees:
            try:
                with context():
                    response = ocp.save_checkpointables_async(str(partial / TREE), trees)
            except Exception as error:
                raise self._explained(error, step) from error

        def finish() -> None:
            try:
                if response is not None:
                    response.result()
                self._check_place(partial)
                self._finish(partial, manifest, host)
            except BaseException as error:
                self._error = self._explained(error, step)
                if processes.writes():
                    shutil.rmtree(partial, ignore_errors=True)

        self._thread = threading.Thread(target=finish, name=f"checkpoint-{step}")
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """See `Checkpoints.wait`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _check_place(self, partial: Path) -> None:
        """Where the directory was moved away meanwhile, Orbax made it anew: that goes again."""
        if self._place is None:
            return
        try:
            self._place.check()
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # is not there, or holds something else
                os.removedirs(self.directory)
            raise

    def _finish(self, partial: Path, manifest: dict[str, Any], host: dict[str, np.ndarray]) -> None:
        """The part in the background: checksums by all processes; manifest, rename and pruning by process 0."""
        process, count = jax.process_index(), jax.process_count()
        final = self.directory / str(manifest["step"])
        if process == 0 and host:
            with open(partial / ARRAYS, "wb") as file:
                np.savez(file, allow_pickle=False, **host)
                file.flush()
                os.fsync(file.fileno())
        # The files of the tree are complete on every process here: Orbax ends with a barrier. Who has its checksums
        # says so by a file, so no collective runs beside the training's own.
        paths = sorted(path for path in (partial / TREE).rglob("*") if path.is_file())
        mine = paths[process::count]
        sums = {
            path.relative_to(partial).as_posix(): [path.stat().st_size, checksum]
            for path, checksum in zip(mine, checksums(mine))
        }
        if process != 0:
            written = partial / f"sums-{process}.json.new"
            written.write_text(json.dumps(sums))
            written.rename(partial / f"sums-{process}.json")
            _await(lambda: final.exists() and not partial.exists(), f"process 0 to complete {final}")
            return
        for other in range(1, count):
            file = partial / f"sums-{other}.json"
            _await(file.exists, f"process {other} to write {file}")
            sums |= json.loads(file.read_text())
            file.unlink()
        if host:
            sums[ARRAYS] = [(partial / ARRAYS).stat().st_size, *checksums([partial / ARRAYS])]
        write_values(partial, manifest | {"files": sums})
        sync(partial)
        replaced = self.directory / f"{final.name}{REPLACED}"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        steps = list_steps(self.directory)
        kept = {*steps[-self.keep :], self.best()}
        for step in set(steps) - kept:
            # Renamed first, so that what a kill leaves behind does not look like a checkpoint.
            doomed = self.directory / f"{step}{PARTIAL}"
            shutil.rmtree(doomed, ignore_errors=True)
            (self.directory / str(step)).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _clean(self) -> None:
        """Removes what a killed process left behind; a replaced checkpoint without its successor goes back."""
        if not self.directory.is_dir():
            return
        for entry in list(self.directory.iterdir()):
            if entry.name.endswith(REPLACED):
                original = entry.with_name(entry.name.removesuffix(REPLACED))
                if original.exists():
                    shutil.rmtree(entry)
                else:
                    entry.rename(original)
            elif entry.name.endswith(PARTIAL):
                shutil.rmtree(entry)

    def _check_space(self, step: int, needed: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"{self.directory}: the checkpoint of step {step} needs {_bytes(needed)}, {_bytes(free)} are free. "
                f"Nothing was written; saved and whole: {listed(list_steps(self.directory))}"
            )

    def _explained(self, error: BaseException, step: int) -> BaseException:
        """What to tell of an error, ours or one of Orbax, which names neither kind nor file but in its text."""
        text = str(error)
        number = getattr(error, "errno", None)
        file = getattr(error, "filename", None) or self.directory
        whole = listed(list_steps(self.directory))
        if number in FULL or "No space left" in text or "ENOSPC" in text or "quota exceeded" in text:
            return UserError(
                f"{file}: the disk is full, the checkpoint of step {step} was not saved. "
                f"Saved and whole: {whole}; free some space and start again"
            )
        if number in NOT_PERMITTED:
            return UserError(
                f"{file}: not permitted ({os.strerror(number)}), the checkpoint of step {step} was not saved. "
                f"Saved and whole: {whole}; change its permissions and start again"
            )
        if isinstance(error, OSError):
            return UserError(f"{file}: the checkpoint of step {step} was not saved: {error}")
        return error


def _await(condition: Any, what: str) -> None:
    deadline = time.monotonic() + OTHERS_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"waited {OTHERS_TIMEOUT} s for {what}; is it alive, and is the directory shared?")
        time.sleep(0.02)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
