"""The loop that pre-training and supervised fine-tuning share: batches -> updates -> records and checkpoints."""

import contextlib
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m1jax.errors import require_positive
from m1jax.model import MiniMaxM1, Remat
from m1jax.train import placement, statistics
from m1jax.train.batch import Batch
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run, free
from m1jax.train.session import Json, Session, SessionRecipe
from m1jax.train.statistics import Mean, Stats
from m1jax.train.step import LossFn, Params, make_evaluation, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopRecipe(SessionRecipe):
    """What does not depend on where the batches come from."""

    optimizer: OptimizerConfig
    steps: int = free(500)
    """updates; a run may go on to more of them where its learning rates so far are those of the longer run"""
    remat: Remat = free("auto")
    """what the backward pass computes again: nothing (none), what is cheap (cheap), whole layers (layers: least memory,
    most time); auto is none on CPU and cheap elsewhere"""
    log_every: int = free(10)
    """updates between lines of metrics.jsonl"""
    evaluate_every: int = free(100)
    """updates between evaluations on held-out data, where there is any"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "steps", "log_every", "evaluate_every")


class Batches(Protocol):
    """An endless iterator whose place can be kept."""

    def __next__(self) -> Batch:
        """This process's share of the next batch's rows, fields [micro-batches, rows, time]; weight is one in the
        mask."""
        ...

    def get_state(self) -> Json:
        """Where it is, as JSON can hold it; the same in every process. All processes ask at once."""
        ...

    def set_state(self, state: Json) -> None:
        """Go there, whatever number of processes kept it."""
        ...

    def close(self) -> None: ...


def supervised_loss(graph: nnx.GraphDef[MiniMaxM1], aux_coefficient: float, remat: Remat = "auto") -> LossFn[Batch]:
    """Cross-entropy of what is trained on plus the routers' balancing loss, as `loss_fn(params, micro-batch)`.

    With weights that sum to one over an update, the loss is the mean over the tokens trained on, in nats. Statistics:
    `nll` (nats per token) and `balance`.
    """

    def loss_fn(params: Params, batch: Batch) -> tuple[Float[Array, ""], Stats]:
        model = nnx.merge(graph, params)
        out = model.forward(batch.tokens, segment_ids=batch.segment_ids, remat=remat)
        log_prob, _ = model.log_probs(out.hidden, batch.targets)
        assert out.aux is not None  # there is no cache
        loss = jnp.sum(batch.weight * (aux_coefficient * out.aux - log_prob))
        stats: Stats = {"nll": Mean.of(-log_prob, batch.weight), "balance": Mean.of(out.aux, batch.weight)}
        return loss, stats

    return loss_fn


def fit(
    run: Run,
    model: MiniMaxM1,
    batches: Batches,
    recipe: LoopRecipe,
    *,
    phase: str,
    heldout: Batch | None = None,
    profile: bool = False,
) -> MiniMaxM1:
    """Trains, or goes on from the newest checkpoint; on the same mesh the result is the same to the bit.

    Args:
        run: where checkpoints and metrics go.
        model: where to start.
        batches: what to train on; closed at the end.
        recipe: how.
        phase: name of this training within the run.
        heldout: what to measure the loss on now and then: this process's share, fields [micro-batches, rows, time].
        profile: trace some updates into the run's `profile/`.

    Returns:
        The trained model.

    Raises:
        SystemExit: asked to stop (SIGTERM), with status `STOPPED`; everything is saved.
        UserError: what `batches` and `Session` raise.
    """
    graph, params = nnx.split(model)
    optimizer = recipe.optimizer.build(recipe.steps)
    loss_fn = supervised_loss(graph, model.config.router_aux_loss_coef, recipe.remat)
    step, measure = make_train_step(loss_fn, optimizer), make_evaluation(loss_fn)

    def evaluated(params: Params) -> dict[str, float | None]:
        if heldout is None:
            return {}
        found = statistics.on_host(measure(params, placement.place_batch(heldout)))
        return {"heldout_nll": found["nll"].value()}

    with (
        contextlib.closing(batches),
        Session(
            run,
            phase,
            config=model.config,
            state=placement.place_state(params, optimizer),
            schedule=recipe.optimizer.schedule(recipe.steps),
            recipe=recipe,
            total=recipe.steps,
            profile=profile,
        ) as session,
    ):
        start = 0
        if session.place is not None:
            start = session.place.state["update"]
            batches.set_state(session.place.state["batches"])
        elif heldout is not None:
            session.record(0, evaluated(session.state.params))
        for done in range(start + 1, recipe.steps + 1):
            stats = session.update(step, _normalised(placement.place_batch(next(batches))))
            figures: dict[str, float | None] = {"skipped": 1.0} if stats is None else statistics.values(stats)
            last = done == recipe.steps
            if last or done % recipe.evaluate_every == 0:
                figures |= evaluated(session.state.params)
            shown = {"loss": figures.get("nll"), "held out": figures.get("heldout_nll")}
            session.show(done, {**shown, "tokens/s": session.tokens_per_second})
            if last or done % recipe.log_every == 0 or "heldout_nll" in figures:
                session.record(done, figures)
            session.checkpoint(
                done, lambda done=done: ({"update": done, "batches": batches.get_state()}, {}), last=last
            )
    return nnx.merge(graph, session.state.params)


@jax.jit
def _normalised(batch: Batch) -> Batch:
    """The weights sum to one over the whole batch, which no process has seen."""
    return dataclasses.replace(batch, weight=batch.weight / jnp.sum(batch.weight))
