"""One training within a run, from where it was left to its end: restores, updates, records, saves and stops.

What is trained on, and when, is the caller's affair (`loop.py`, `m1jax.rl.trainer`); what every training must do alike
is here.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from m1jax.checkpoint import Checkpoints
from m1jax.config import ModelConfig
from m1jax.errors import STOPPED, UserError, require_positive
from m1jax.flops import training_flops
from m1jax.train import allocator, statistics
from m1jax.train.batch import Batch
from m1jax.train.guards import NonFiniteGuard, OnNonFinite, StopRequests
from m1jax.train.meter import Meter, Tracer
from m1jax.train.metrics import MetricsLog
from m1jax.train.optimizer import Schedule, updates_made
from m1jax.train.progress import Reporter
from m1jax.train.run import Run, free
from m1jax.train.statistics import Mean, Stats
from m1jax.train.step import Report, TrainState, TrainStep

Json = Any
"""what a checkpoint's `meta` can hold; only who wrote it knows what it is"""
Arrays = Mapping[str, Any]
"""nested dictionaries of numpy arrays"""
Figures = Mapping[str, float | Sequence[float | None] | None]
"""what is recorded; None where there is no figure"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionRecipe:
    """What every training must be told."""

    checkpoint_every: int = free(100)
    """updates between checkpoints"""
    on_nonfinite: OnNonFinite = free("stop")
    """what to do when a loss or gradient is not finite: stop, or skip the update"""

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a training was left."""

    state: Json
    """as it was given to `Session.checkpoint`"""
    arrays: Arrays


class Session:
    """A training that goes on from its newest checkpoint. A context manager.

    Args:
        run: where checkpoints and metrics go, and where it may have begun.
        phase: name of this training within the run.
        config: the model's.
        state: where a new training begins; afterwards, where it is.
        schedule: of the learning rate over the whole training.
        recipe: how.
        total: steps to show progress over.
        profile: trace some updates into the run's `profile/`.

    Raises:
        UserError: what `Checkpoints` and `NonFiniteGuard` raise, or the run was planned longer or shorter and its
            learning rate would have been another one until now.
    """

    def __init__(
        self,
        run: Run,
        phase: str,
        *,
        config: ModelConfig,
        state: TrainState,
        schedule: Schedule,
        recipe: SessionRecipe,
        total: int,
        profile: bool = False,
    ):
        allocator.keep_freed_memory()
        self.state, self.place = state, None
        self._run, self._phase, self._config = run, phase, config
        self._schedule, self._every, self._total = schedule, recipe.checkpoint_every, total
        self._guard = NonFiniteGuard(run.directory, recipe.on_nonfinite)
        self._tracer = Tracer(run.directory / "profile" if profile else None)
        self._stop = StopRequests()
        self._saved = 0
        """number of the newest checkpoint"""
        self._recorded = -1
        """step of the newest record"""
        self._done = 0
        self._open = contextlib.ExitStack()

    state: TrainState
    place: Place | None
    """where the training was left; None: it is new"""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            directory = self._run.checkpoints_of(self._phase)
            self._checkpoints = opened.enter_context(Checkpoints(directory, config=self._config, keep=2))
            opened.enter_context(self._stop)
            opened.enter_context(self._tracer)
            where = self._restore()
            self._reporter = opened.enter_context(Reporter(self._phase.upper(), self._total, self._done))
            if where:
                self._reporter.message(where)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)
        if raised[0] is not None:  # else another training of the run goes on with it
            self._run.close()

    def update(self, step: TrainStep, batch: Batch, *, planned: float | None = None) -> Stats | None:
        """One update.

        Args:
            step: of `make_train_step`.
            batch: placed, fields [micro-batches, rows, time].
            planned: see `make_train_step`.

        Returns:
            What was measured: the loss's own statistics, and `loss`, `grad_norm`, `learning_rate`. None where the
            update was left out because something was not finite.

        Raises:
            UserError: something was not finite, and the recipe says stop.
        """
        self._tracer.next()
        self.state, report = step(self.state, batch, planned=None if planned is None else np.float32(planned))
        report: Report = jax.device_get(report)
        own = {"loss": float(report.loss), "grad_norm": float(report.grad_norm)}
        tokens, number = float(report.tokens), int(self.state.step)
        self.worked(tokens, training_flops(self._config, tokens, float(report.pairs)))
        if self._guard.check(number, float(report.skipped), batch, own):
            self._reporter.message(f"update {number} is left out: its loss or a gradient is not finite")
            return None
        if report.learning_rate is not None:
            own["learning_rate"] = float(report.learning_rate)
        return statistics.on_host(report.stats) | {name: Mean(value, 1.0) for name, value in own.items()}

    def worked(self, tokens: float, flops: float) -> None:
        """Counts tokens that were trained on or generated, and the operations that took."""
        self._meter.add(tokens, flops)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run so far."""
        return self._meter.tokens / self._meter.seconds

    def show(self, done: int, figures: Mapping[str, float | None]) -> None:
        """Progress: `done` of the total, with the step's figures; those that are None are not shown."""
        self._done = done
        self._reporter.update(done, {name: value for name, value in figures.items() if value is not None})

    def message(self, text: str) -> None:
        """One line to whoever watches."""
        self._reporter.message(text)

    def record(self, step: int, figures: Figures) -> dict[str, float | None]:
        """A line of metrics.jsonl, on disk when this returns. To be called before the checkpoint that lies behind it.

        Returns:
            What the meter added (see `Meter.record`).
        """
        measured = self._meter.record()
        self._run.record(self._phase, step, {**figures, **measured})
        self._recorded = step
        return measured

    def checkpoint(self, number: int, place: Callable[[], tuple[Json, Arrays]], *, last: bool = False) -> None:
        """A checkpoint where one is due or the training is asked to stop. To be called after every step, by all
        processes.

        Args:
            number: of the step, counted in planned updates.
            place: gives what the next process must know beside the state, the same in every process; asked only where
                a checkpoint is due.
            last: whether the training ends here.

        Raises:
            SystemExit: asked to stop (SIGTERM), with status `STOPPED`; everything is saved.
        """
        stopping = self._stop.requested() and not last
        if not (last or stopping or number - self._saved >= self._every):
            return
        self._meter.tick()
        self._saved, (state, arrays) = number, place()
        self._checkpoints.save(
            number,
            params=self.state.params,
            state=self.state._replace(params=()),
            arrays=arrays,
            meta={
                "place": state,
                "seconds": self._meter.seconds,
                "tokens": self._meter.tokens,
                "recorded": self._recorded,
                "records": self._run.log.count(self._phase),
                "done": self._done,
                "planned": self._schedule.total_steps,
            },
        )
        if stopping:
            self._checkpoints.wait()
            self._reporter.message(f"asked to stop: update {number} is saved; the same command goes on from there")
            raise SystemExit(STOPPED)

    def _restore(self) -> str:
        """Goes to the newest checkpoint, if there is one; what to say about that."""
        target = {"params": self.state.params, "state": self.state._replace(params=())}
        found, said, source = self._checkpoints.restore(**target), "goes on", self._run.directory
        branch = self._run.branch if found is None else None
        if branch is not None:
            source, step = branch
            with Checkpoints(source / "checkpoints" / self._phase, config=self._config) as others:
                there = others.steps()
                if not there or step not in (None, *there):
                    raise UserError(
                        f"--from {source}: it has no checkpoint of {self._phase} {'' if step is None else step}; "
                        f"there are: {', '.join(map(str, there)) or 'none'}"
                    )
                found, said = others.restore(**target, step=step), "branches off"
            self._run.log.records = MetricsLog(source, writes=False).records
        if found is None:
            lost = self._run.log.count(self._phase)
            self._run.log.resume(self._phase, -1)
            self._meter = Meter()
            return f"begins anew: {self._run.directory} had no checkpoint of {self._phase} yet" if lost else ""
        self.state = found.state._replace(params=found.params)
        self.place = Place(found.meta["place"], found.arrays)
        self._saved, self._done, self._recorded = found.step, found.meta["done"], found.meta["recorded"]
        longer = self._replanned(found.meta["planned"], found.step, branch is not None)
        self._run.log.resume(self._phase, self._recorded, found.meta["records"])
        self._meter = Meter(found.meta["seconds"], found.meta["tokens"])
        return f"{said} from update {found.step} of {source}{longer}"

    def _replanned(self, before: int, number: int, branched: bool) -> str:
        """What another number of updates changes."""
        now = self._schedule.total_steps
        if now == before:
            return ""
        if now < number:
            raise UserError(f"{self._run.directory} has made {number} updates; a run of {now} cannot go on from there")
        was = Schedule(self._schedule.config, before)
        made = updates_made(self.state.opt_state)
        then, here = (float(schedule(made - 1, number - 1)) for schedule in (was, self._schedule))
        planned = f"planned for {now} updates instead of {before}"
        if then == here:
            return f"; {planned}, with the learning rates of a run of {now} so far"
        change = f"the learning rate, {then:.3g} there, would be {here:.3g}"
        if not branched:
            raise UserError(
                f"{self._run.directory} cannot be {planned}: at update {number} {change}; to go on all the same, "
                f"branch off: --from {self._run.directory} --name ANOTHER"
            )
        return f"; {planned}: {change.replace('would be', 'becomes')}"
