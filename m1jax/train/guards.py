"""What stops a run before it does harm: a loss or gradient that is not finite, and the wish of the cluster (SIGTERM).

The step itself never applies a bad update (`apply_if_finite`), because its old state is donated: once the host has read
the statistics, there would be nothing left to go back to. What happens next is the host's choice (`NonFiniteGuard`).
"""

import itertools
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from m1jax import processes
from m1jax.errors import UserError
from m1jax.train.batch import Batch
from m1jax.train.metrics import line

OnNonFinite = Literal["stop", "skip"]


def apply_if_finite(new: Any, old: Any, loss: jax.Array, grads: Any) -> tuple[Any, jax.Array]:
    """The new state where loss and all gradients are finite, else the old one. For use inside the jitted step.

    Args:
        new, old: pytrees of one structure (parameters, optimizer state).
        loss: scalar.
        grads: pytree of gradients, before clipping.

    Returns:
        The state to go on with, and float32 1 if the update was left out, else 0.
    """
    finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda g: jnp.isfinite(g).all(), (loss, grads)))
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), 1.0 - finite.astype(jnp.float32)


class NonFiniteGuard:
    """Reacts on the host to an update that `apply_if_finite` left out: keeps the batch, then stops or goes on.

    Args:
        directory: where batches are kept, as `nonfinite/step-N.npz` (`step-N.process-K.npz` with several processes:
            each writes the rows it holds) beside a `step-N.json` with the statistics.
        on_nonfinite: "stop" raises at the first; "skip" goes on without the update.
        patience: with "skip", so many left out one after the other stop the run: it is broken, not unlucky.
    """

    def __init__(self, directory: str | os.PathLike[str], on_nonfinite: OnNonFinite = "stop", *, patience: int = 10):
        if on_nonfinite not in ("stop", "skip"):
            raise UserError(f"on_nonfinite must be 'stop' or 'skip', not {on_nonfinite!r}")
        self._directory = Path(directory) / "nonfinite"
        self._stop, self._patience, self._in_a_row = on_nonfinite == "stop", patience, 0

    def check(self, step: int, skipped: float, batch: Batch, figures: Mapping[str, float]) -> bool:
        """Call after each update with its batch and what was measured. Returns whether it was left out.

        Raises:
            UserError: it was, and the configuration (or `patience`) says stop. The batch is saved by then.
        """
        if not float(skipped):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        path = self._save(step, batch, figures)
        measured = ", ".join(f"{name} {figures[name]}" for name in ("loss", "grad_norm") if name in figures)
        found = f"update {step}: the loss or a gradient is not finite ({measured}); parameters are as before it"
        if self._stop:
            raise UserError(f"{found}. Its batch: {path}. on_nonfinite='skip' would go on without it")
        if self._in_a_row >= self._patience:
            raise UserError(f"{found}; {self._in_a_row} updates in a row were. The last batch: {path}")
        return True

    def _save(self, step: int, batch: Batch, figures: Mapping[str, float]) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        several = jax.process_count() > 1
        path = self._directory / (f"step-{step}" + (f".process-{jax.process_index()}" if several else "") + ".npz")
        arrays: dict[str, Any] = {name: processes.own_rows(value) for name, value in batch.fields().items()}
        np.savez_compressed(path, **arrays)
        if processes.writes():
            (self._directory / f"step-{step}.json").write_text(line(figures) + "\n")
        return path


class StopRequests:
    """Turns SIGTERM (to any process of the job) into an answer of `requested`. A context manager.

    With `jax.distributed`, JAX listens by itself and finds the update after which all processes can stop together.
    """

    _asked = itertools.count(1)  # of the whole process: the coordination service wants numbers that only grow

    def __init__(self) -> None:
        self._received = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def requested(self) -> bool:
        """Whether to save and leave now. To be called once after every update, by every process."""
        if jax.distributed.is_initialized():
            return processes.stop_agreed(next(self._asked))
        return self._received

    def _note(self, _signal: int, _frame: Any) -> None:
        self._received = True
