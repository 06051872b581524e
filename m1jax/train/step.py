"""The step shared by pre-training, SFT and RL: micro-batches -> summed gradients -> one optimizer update, in one jitted
program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m1jax.train.guards import apply_if_finite
from pallas_kernels import PADDING

Params = Any
Batch = Any
Stats = dict[str, jax.Array]
LossFn = Callable[[Params, Batch], tuple[jax.Array, Stats]]


class TrainState(NamedTuple):
    """All that an update reads and writes; a plain pytree."""

    params: Params
    opt_state: Any
    step: jax.Array
    """number of updates made, int32"""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def add_stats(a: Stats, b: Stats) -> Stats:
    """Combine two parts of a batch: names ending in `_max` by maximum, all others by sum."""
    return {name: jnp.maximum(a[name], b[name]) if name.endswith("_max") else a[name] + b[name] for name in a}


def accumulate(
    loss_fn: LossFn, params: Params, batches: Batch, count: jax.Array | int
) -> tuple[Params, jax.Array, Stats]:
    """Sum loss, gradients and statistics over the first `count` micro-batches.

    The loss of a batch must be the sum of the losses of its micro-batches (weights normalised beforehand over the whole
    batch), so that the result does not depend on how the batch was cut.

    Args:
        loss_fn: (params, micro-batch) -> (loss, statistics).
        params: pytree.
        batches: pytree of arrays with a leading axis of micro-batches.
        count: how many of them to use; may be a traced value, which spares a compilation per count.

    Returns:
        Gradients (float32), loss, statistics.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def body(i, carry):
        grads, loss, stats = carry
        (new_loss, new_stats), new_grads = grad_fn(params, jax.tree.map(lambda x: x[i], batches))
        return jax.tree.map(jnp.add, grads, new_grads), loss + new_loss, add_stats(stats, new_stats)

    first = jax.tree.map(lambda x: x[0], batches)
    if jax.tree.leaves(batches)[0].shape[0] == 1:  # nothing to sum: neither zeros to begin with nor a loop
        (loss, stats), grads = grad_fn(params, first)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), loss, stats
    shapes = jax.eval_shape(loss_fn, params, first)[1]
    start = (
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        jnp.zeros((), jnp.float32),
        {name: jnp.full(s.shape, -jnp.inf if name.endswith("_max") else 0, s.dtype) for name, s in shapes.items()},
    )
    return jax.lax.fori_loop(0, count, body, start)


def token_counts(segment_ids: jax.Array) -> Stats:
    """`tokens` of packed rows [..., time], and `pairs` of a token with itself and those before it in its segment: what
    a batch costs depends on these two (`m1jax.flops.training_flops`). float32."""
    steps = jnp.arange(segment_ids.shape[-1])
    starts = jnp.diff(segment_ids, axis=-1, prepend=-2) != 0
    first = jax.lax.cummax(jnp.where(starts, steps, 0), axis=segment_ids.ndim - 1)
    real = segment_ids != PADDING
    return {
        "tokens": jnp.sum(real, dtype=jnp.float32),
        "pairs": jnp.sum(jnp.where(real, steps - first + 1, 0).astype(jnp.float32)),
    }


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Stats]]:
    """Build `step(state, batches, count=None) -> (state, stats)`, jitted, the old state donated.

    `batches` holds `segment_ids` and whatever loss_fn wants, all [micro-batches, rows, time]. `count` of them are used;
    None: the leading ones that hold any token.

    stats are those of loss_fn plus `loss`, `grad_norm` (global norm before clipping), `tokens` and `pairs` (see
    `token_counts`) and `skipped`: 1 where loss or gradients were not finite and parameters and optimizer state stayed
    as they were.
    """

    @jax.jit(donate_argnums=0)
    def step(state: TrainState, batches: Batch, count: jax.Array | None = None) -> tuple[TrainState, Stats]:
        if count is None:
            count = jnp.sum(jnp.any(batches["segment_ids"] != PADDING, axis=(1, 2)))
        grads, loss, stats = accumulate(loss_fn, state.params, batches, count)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = optax.apply_updates(state.params, updates), opt_state
        (params, opt_state), skipped = apply_if_finite(updated, (state.params, state.opt_state), loss, grads)
        stats |= {"loss": loss, "grad_norm": optax.tree.norm(grads), "skipped": skipped}
        return TrainState(params, opt_state, state.step + 1), stats | token_counts(batches["segment_ids"])

    return step
