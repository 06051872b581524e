"""Log-probabilities of a generation batch under other policies than the one that is trained: the old one, recomputed
by the trainer, and the reference."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m1jax import processes
from m1jax.model import MiniMaxM1, Remat
from m1jax.model.groups import Side, continuations
from m1jax.rl.types import RLBatch, Updates, stacked
from m1jax.train import placement
from m1jax.train.step import Params
from pallas_kernels import PADDING


class Policies:
    """Fills in what the loss needs beside the sampler's log-probabilities.

    Args:
        graph: of `nnx.split(model)`.
        temperature: of sampling.
        recompute_old: `old_logp` becomes the trainer's own, of the parameters that the updates begin with.
        reference: parameters that `reference_logp` is of; None: it is not needed.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[MiniMaxM1],
        *,
        temperature: float,
        recompute_old: bool,
        reference: Params | None,
    ):
        self._recompute_old, self._reference = recompute_old, reference
        self._log_probs = _make_log_probs(graph, temperature)

    def __call__(self, updates: Updates, params: Params) -> Updates:
        """The same updates with these fields."""
        if not len(updates) or not (self._recompute_old or self._reference is not None):
            return updates
        return Updates(stacked([self._filled(batch, params) for batch in updates.remaining(0)]))

    def _filled(self, batch: RLBatch, params: Params) -> RLBatch:
        placed = placement.place_batch(placement.own_share(batch))
        if self._recompute_old:
            batch = dataclasses.replace(
                batch, sampler_logp=batch.old_logp, old_logp=self._under(params, placed, batch.mask)
            )
        if self._reference is not None:
            batch = dataclasses.replace(batch, reference_logp=self._under(self._reference, placed, batch.mask))
        return batch

    def _under(self, params: Params, placed: RLBatch, mask: jax.Array) -> jax.Array:
        logp = processes.on_host(self._log_probs(params, placed))
        return np.where(mask, logp, np.float32(0))  # pyright: ignore[reportReturnType] (a batch on the host)


def hidden_of(model: MiniMaxM1, batch: RLBatch, remat: Remat = "auto") -> Float[Array, "rows time hidden"]:
    """Hidden states of a micro-batch, along its routes if it has any; its prompts, where they stand apart, go first."""
    if batch.prompts is None:
        return model.forward(
            batch.tokens, segment_ids=batch.segment_ids, routes=batch.routes, remat=remat, aux_loss_over="nothing"
        ).hidden
    lengths = jnp.sum(batch.segment_ids != PADDING, axis=1, dtype=jnp.int32)
    before = jnp.sum(batch.prompts >= 0, axis=1, dtype=jnp.int32)
    prompts = Side(jnp.maximum(batch.prompts, 0), before, batch.prompt_routes)
    return continuations(model, prompts, Side(batch.tokens, lengths, batch.routes), remat=remat)


def _make_log_probs(graph: nnx.GraphDef[MiniMaxM1], temperature: float) -> Callable[[Params, RLBatch], jax.Array]:
    @jax.jit
    def log_probs(params: Params, batch: RLBatch) -> jax.Array:
        model = nnx.merge(graph, params)

        def one(micro: RLBatch) -> jax.Array:
            return model.log_probs(hidden_of(model, micro), micro.targets, temperature=temperature)[0]

        return jax.lax.map(one, batch)

    return log_probs
