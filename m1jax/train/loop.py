"""The loop that pre-training and supervised fine-tuning share: batches -> updates -> records and checkpoints."""

import contextlib
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m1jax.checkpoint import Checkpoints
from m1jax.errors import STOPPED, require_positive
from m1jax.flops import training_flops
from m1jax.model import MiniMaxM1
from m1jax.train import placement
from m1jax.train.guards import NonFiniteGuard, OnNonFinite, StopRequests
from m1jax.train.meter import Meter, Tracer
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.progress import Reporter
from m1jax.train.run import Run
from m1jax.train.step import LossFn, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopRecipe:
    """What does not depend on where the batches come from."""

    optimizer: OptimizerConfig
    steps: int = 500
    """updates"""
    remat: bool = False
    """recompute layers in the backward pass: less memory, more time"""
    checkpoint_every: int = 100
    """updates between checkpoints"""
    log_every: int = 10
    """updates between lines of metrics.jsonl"""
    on_nonfinite: OnNonFinite = "stop"
    """what to do when a loss or gradient is not finite"""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "checkpoint_every", "log_every")


class Batches(Protocol):
    """An endless iterator whose place can be kept."""

    def __next__(self) -> dict[str, np.ndarray]:
        """This process's share of the next batch's rows: tokens, targets, segment_ids int32 and weight float32 (one
        where a token is trained on, else zero), all [micro-batches, rows, time]."""
        ...

    def get_state(self) -> Any:
        """Where it is, as JSON can hold it; the same in every process. All processes ask at once."""
        ...

    def set_state(self, state: Any) -> None:
        """Go there, whatever number of processes kept it."""
        ...

    def close(self) -> None: ...


def supervised_loss(graph: Any, aux_coefficient: float, remat: bool = False) -> LossFn:
    """Cross-entropy of what is trained on plus the routers' balancing loss, as `loss_fn(params, micro-batch)`.

    The micro-batch holds tokens, targets, segment_ids [R, L] int32 and weight [R, L] float32, which sums to 1 over the
    whole batch: the loss is the mean over the tokens trained on, in nats.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        model: MiniMaxM1 = nnx.merge(graph, params)
        states = model.forward(batch["tokens"], segment_ids=batch["segment_ids"], remat="layers" if remat else "none")
        log_prob, _ = model.log_probs(states.hidden, batch["targets"])
        nll = -jnp.sum(batch["weight"] * log_prob)
        aux = jnp.sum(batch["weight"] * states.aux)
        return nll + aux_coefficient * aux, {"nll": nll, "balance": aux}

    return loss_fn


def fit(
    run: Run, model: MiniMaxM1, batches: Batches, recipe: LoopRecipe, *, phase: str, profile: bool = False
) -> MiniMaxM1:
    """Trains, or goes on from the newest checkpoint; on the same mesh the result is the same to the bit.

    Args:
        run: where checkpoints and metrics go.
        model: where to start.
        batches: what to train on; closed at the end.
        recipe: how.
        phase: name of this training within the run.
        profile: trace some updates into the run's `profile/`.

    Returns:
        The trained model.

    Raises:
        SystemExit: asked to stop (SIGTERM), with status `STOPPED`; everything is saved.
        UserError: what `batches`, `Checkpoints` and `NonFiniteGuard` raise.
    """
    graph, params = nnx.split(model)
    optimizer = recipe.optimizer.build(recipe.steps)
    step_fn = make_train_step(supervised_loss(graph, model.config.router_aux_loss_coef, recipe.remat), optimizer)
    state = placement.place_state(params, optimizer)
    guard = NonFiniteGuard(run.directory, recipe.on_nonfinite)
    with (
        contextlib.closing(batches),
        Checkpoints(run.checkpoints_of(phase), config=model.config, keep=2) as checkpoints,
        StopRequests() as stop,
        Tracer(run.directory / "profile" if profile else None) as tracer,
    ):
        start, meta = 0, {"seconds": 0.0, "tokens": 0}
        found = checkpoints.restore(params=state.params, state=state._replace(params=()))
        if found is not None:
            state, start, meta = found.state._replace(params=found.params), found.step, found.meta
            batches.set_state(meta["batches"])
        run.log.resume(phase, start if found is not None else -1)
        meter = Meter(meta["seconds"], meta["tokens"])
        with Reporter(phase.upper(), recipe.steps, start) as reporter:
            for done in range(start + 1, recipe.steps + 1):
                tracer.next()
                batch = _normalised(placement.place_batch(next(batches)))
                state, stats = step_fn(state, batch)
                stats = {name: float(value) for name, value in jax.device_get(stats).items()}
                guard.check(done, stats.pop("skipped"), batch, stats)
                tokens = stats.pop("tokens")
                meter.add(tokens, training_flops(model.config, tokens, stats.pop("pairs")))
                reporter.update(done, {"loss": stats["nll"], "tokens/s": meter.tokens / meter.seconds})
                last = done == recipe.steps
                stopping = stop.requested() and not last
                if done % recipe.log_every == 0 or last:
                    run.log.append(phase, done, {**stats, **meter.record()})
                if done % recipe.checkpoint_every == 0 or last or stopping:
                    meta = {"seconds": meter.seconds, "tokens": meter.tokens, "batches": batches.get_state()}
                    checkpoints.save(done, params=state.params, state=state._replace(params=()), meta=meta)
                if stopping:
                    checkpoints.wait()
                    reporter.message(f"asked to stop: update {done} is saved; the same command goes on from there")
                    raise SystemExit(STOPPED)
    return nnx.merge(graph, state.params)


@jax.jit
def _normalised(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights sum to 1 over the whole batch, which no process has seen."""
    return {**batch, "weight": batch["weight"] / jnp.sum(batch["weight"])}
