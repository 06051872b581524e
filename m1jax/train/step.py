"""The step shared by pre-training, SFT and RL: micro-batches -> summed gradients -> one optimizer update, in one jitted
program."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from m1jax.compiling import compiler_options, update_options
from m1jax.model.parallel import with_all_of_time
from m1jax.train import statistics
from m1jax.train.batch import Batch
from m1jax.train.guards import apply_if_finite
from m1jax.train.statistics import Stats
from pallas_kernels import PADDING

B = TypeVar("B", bound=Batch)
Params = nnx.State
LossFn = Callable[[Params, B], tuple[Float[Array, ""], Stats]]


class TrainState(NamedTuple):
    """All that an update reads and writes; a plain pytree."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    """number of updates so far, those left out included"""


class Report(NamedTuple):
    """What an update says about itself; float32 scalars, and the loss's own statistics."""

    stats: Stats
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """global norm before clipping"""
    learning_rate: Float[Array, ""] | None
    """None: the optimizer does not tell"""
    skipped: Float[Array, ""]
    """1 where loss or gradients were not finite and parameters and optimizer state stayed as they were"""
    tokens: Float[Array, ""]
    """in the batch"""
    pairs: Float[Array, ""]
    """of a token with itself and those before it in its segment (`m1jax.flops.training_flops`)"""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def accumulate(
    loss_fn: LossFn[B], params: Params, batches: B, count: jax.Array | int
) -> tuple[Params, Float[Array, ""], Stats]:
    """Sum loss and gradients, and merge statistics, over the first `count` micro-batches.

    The loss of a batch must be the sum of the losses of its micro-batches (weights normalised beforehand over the whole
    batch), so that the result does not depend on how the batch was cut.

    Args:
        loss_fn: (params, micro-batch) -> (loss, statistics).
        params: pytree.
        batches: fields with a leading axis of micro-batches.
        count: how many of them to use; may be a traced value, which spares a compilation per count.

    Returns:
        Gradients (float32), loss, statistics.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def body(i, carry):
        grads, loss, stats = carry
        (new_loss, new_stats), new_grads = grad_fn(params, batches.map(lambda x: x[i]))
        return jax.tree.map(jnp.add, grads, new_grads), loss + new_loss, statistics.merge([stats, new_stats])

    first = batches.map(lambda x: x[0])
    if len(batches.tokens) == 1:  # nothing to sum: neither zeros to begin with nor a loop
        (loss, stats), grads = grad_fn(params, first)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), loss, stats
    shapes = jax.eval_shape(loss_fn, params, first)[1]
    start = (
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        jnp.zeros((), jnp.float32),
        statistics.empty(shapes),
    )
    return jax.lax.fori_loop(0, count, body, start)


def token_counts(segment_ids: Int[Array, "*batch time"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Tokens of packed rows, and pairs of a token with itself and those before it in its segment: what a batch costs
    depends on these two. float32."""

    def places(segment_ids: jax.Array) -> jax.Array:
        steps = jnp.arange(segment_ids.shape[1])
        starts = jnp.diff(segment_ids, axis=1, prepend=-2) != 0
        return steps - jax.lax.cummax(jnp.where(starts, steps, 0), axis=1) + 1

    rows = segment_ids.reshape(-1, segment_ids.shape[-1])
    real = rows != PADDING
    pairs = jnp.sum(jnp.where(real, with_all_of_time(places, rows), 0).astype(jnp.float32))
    return jnp.sum(real, dtype=jnp.float32), pairs


TrainStep = Callable[..., tuple[TrainState, Report]]
"""`step(state, batches, *, planned=None, count=None)`, see `make_train_step`"""


def make_train_step(loss_fn: LossFn[B], optimizer: optax.GradientTransformation) -> TrainStep:
    """Build `step(state, batches, *, planned=None, count=None) -> (state, Report)`, jitted, the old state donated.

    `batches` has fields [micro-batches, rows, time]. `count` of them are used; None: the leading ones that hold any
    token. `planned` is where the update stands in the run (see `optimizer.Schedule`); None: behind all updates made so
    far.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit(donate_argnums=0, compiler_options=update_options())
    def step(
        state: TrainState, batches: B, *, planned: jax.Array | None = None, count: jax.Array | None = None
    ) -> tuple[TrainState, Report]:
        if count is None:
            count = jnp.sum(jnp.any(batches.segment_ids != PADDING, axis=(1, 2)))
        grads, loss, stats = accumulate(loss_fn, state.params, batches, count)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, planned=planned)
        rate = optax.tree.get(opt_state, "learning_rate")
        updated = optax.apply_updates(state.params, updates), opt_state
        (params, opt_state), skipped = apply_if_finite(updated, (state.params, state.opt_state), loss, grads)
        report = Report(stats, loss, optax.tree.norm(grads), rate, skipped, *token_counts(batches.segment_ids))
        return TrainState(params, opt_state, state.step + 1), report

    return step


def make_evaluation(loss_fn: LossFn[B]) -> Callable[[Params, B], Stats]:
    """Build `evaluate(params, batches) -> statistics` of all micro-batches, jitted, without gradients."""

    def evaluate(params: Params, batches: B) -> Stats:
        def part(i: jax.Array | int) -> Stats:
            return loss_fn(params, batches.map(lambda x: x[i]))[1]

        start = statistics.empty(jax.eval_shape(part, 0))
        count = len(batches.tokens)
        return jax.lax.fori_loop(0, count, lambda i, stats: statistics.merge([stats, part(i)]), start)

    return jax.jit(evaluate, compiler_options=compiler_options())
