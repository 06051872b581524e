"""Language modelling in a few lines, for models that only have to be trained."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from m1jax.model import MiniMaxM1

LAST = 20
"""steps whose mean loss is told"""


class Schedule(NamedTuple):
    """The learning rate rises over `warm` steps and falls along a cosine to a tenth at the last one."""

    rate: float
    warm: int
    steps: int

    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.schedules.warmup_cosine_decay_schedule(0.0, self.rate, self.warm, self.steps, self.rate / 10)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.9, b2=0.95, eps=1e-15))


def train(
    model: MiniMaxM1, schedule: Schedule, batches: Iterable[Int[np.ndarray, "rows time+1"]]
) -> tuple[nnx.State, float]:
    """Parameters after a step on each batch, and the mean of the last losses in nats. The model's own are used up."""
    graph, params = nnx.split(model)
    state, values = schedule.optimizer().init(params), []
    for number, tokens in enumerate(batches, 1):
        params, state, value = _step(graph, schedule, params, state, tokens)
        values = [*values[1 - LAST :], value]
        if number % 100 == 0:
            print(f"step {number}: {float(value):.3f} nats a token", flush=True)
    return params, float(np.mean([float(value) for value in values]))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(graph: nnx.GraphDef[MiniMaxM1], schedule: Schedule, params: nnx.State, state: Any, tokens: Array) -> Any:
    def loss(params: nnx.State) -> Float[Array, ""]:
        model = nnx.merge(graph, params)
        return -jnp.mean(model.log_probs(model.forward(tokens[:, :-1]).hidden, tokens[:, 1:])[0])

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = schedule.optimizer().update(grads, state, params)
    return optax.apply_updates(params, updates), state, value
