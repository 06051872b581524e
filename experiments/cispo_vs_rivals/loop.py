"""Reinforcement learning of one small model as a function of arrays, to be vmapped over many.

What tells arms apart is data (task, objective, number of updates, learning rate), so that one compiled program serves
them all. The objective is `m1jax.rl.losses`' own; advantages and normaliser are those of `m1jax.rl.advantages` and
`aggregation.prompt_mean`, which work on the host, written again for a fixed number of groups (a test compares them).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from experiments.cispo_vs_rivals import policy, tasks
from experiments.cispo_vs_rivals.arms import ARMS
from experiments.cispo_vs_rivals.policy import Params
from m1jax.rl import corrections
from m1jax.rl.losses import Surrogate, Tokens, policy_loss
from m1jax.train.statistics import Mean

PROMPTS, SAMPLES, UPDATES = 32, 8, 16
SLOTS = PROMPTS // UPDATES
"""groups in a micro-batch, of which there are UPDATES; an update takes one or several"""


class Settings(NamedTuple):
    """Of one run."""

    task: Int[Array, ""]
    arm: Int[Array, ""]
    updates: Int[Array, ""]
    """per batch; divides UPDATES"""
    learning_rate: Float[Array, ""]
    mismatch: Float[Array, ""]
    """the sampler's weights are the trainer's plus so many times their error of rounding to bfloat16"""
    truncated: Bool[Array, ""]
    """whether truncated importance sampling corrects for it"""


class State(NamedTuple):
    params: Params
    opt_state: Any
    key: Array


class History(NamedTuple):
    """Of every batch: what its samples and updates say."""

    accuracy: Array
    rechecked: Array
    """share of responses"""
    entropy: Array
    """nats per token, as the updates see it"""
    clipped: Array
    """share of tokens that a bound or mask touched"""
    clipped_rare: Array
    """the same among recheck tokens; NaN where there was none"""
    ratio_max: Array
    kl: Array
    """k3, over the batch's updates"""
    grad_norm: Array
    """mean over updates, before clipping"""
    gap: Array
    """mean |log-probability of trainer - sampler| of written tokens, at the parameters that generated"""
    gap_max: Array
    groups: Array
    """that taught something"""


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-15))


def begin(params: Params, key: Array) -> State:
    return State(params, OPTIMIZER.init(params), key)


def train(state: State, settings: Settings, *, batches: int, replay: bool = False) -> tuple[State, History]:
    """So many batches; `replay`: the trainer takes the experts that the sampler chose."""

    def batch(state: State, _: None) -> tuple[State, History]:
        return _batch(state, settings, replay)

    return jax.lax.scan(batch, state, None, length=batches)


def _batch(state: State, settings: Settings, replay: bool) -> tuple[State, History]:
    key, key_prompts, key_sample = jax.random.split(state.key, 3)
    problems = jax.vmap(tasks.prompt, (0, None))(jax.random.split(key_prompts, PROMPTS), settings.task)
    prompts = jnp.repeat(problems, SAMPLES, axis=0)
    sampler = jax.tree.map(lambda p: p + settings.mismatch * _rounding(p), state.params)
    responses, sampler_logp, routes = policy.sample(sampler, prompts, key_sample)
    judged = tasks.judge(prompts, responses)
    tokens = jnp.concatenate([prompts, responses], axis=1)
    routes = routes if replay else None
    trainer_logp, _ = policy.log_probs(state.params, tokens, routes)
    gap = jnp.abs(trainer_logp - sampler_logp)
    factor = corrections.truncated(trainer_logp, sampler_logp, judged.written)

    rewards = judged.reward.reshape(PROMPTS, SAMPLES)
    useful = jnp.max(rewards, axis=1) > jnp.min(rewards, axis=1)
    slots = dealt(useful, settings.updates)
    by_batch = jnp.array([arm.scale == "batch" for arm in ARMS.values()])[settings.arm]
    advantage = jnp.where(by_batch, advantages(rewards, useful, over_batch=True), advantages(rewards, useful))
    length = jnp.sum(judged.written, axis=1).reshape(PROMPTS, SAMPLES)
    weight = prompt_mean(length, slots, settings.updates)

    def of_rows(x: Array) -> Array:
        return jnp.broadcast_to(x.reshape(PROMPTS * SAMPLES, 1), responses.shape)

    rows = {
        "tokens": tokens,
        "old_logp": jnp.where(settings.truncated, trainer_logp, sampler_logp),
        "advantage": of_rows(advantage),
        "mask": judged.written,
        "weight": of_rows(jnp.broadcast_to(weight[:, None], rewards.shape)),
        "correction": jnp.where(settings.truncated, factor, 1.0),
        "routes": routes,
    }
    groups = jax.tree.map(lambda x: x.reshape(PROMPTS, SAMPLES, *x.shape[1:]), rows)
    micro = jax.tree.map(lambda x: x[slots].reshape(UPDATES, SLOTS * SAMPLES, *x.shape[2:]), groups)
    there = jnp.repeat((slots >= 0).reshape(UPDATES, SLOTS), SAMPLES, axis=1)
    micro["mask"] = micro["mask"] & there[..., None]
    micro["weight"] = jnp.where(micro["mask"], micro["weight"], 0.0)

    every = UPDATES // settings.updates
    at_end = (jnp.arange(UPDATES) + 1) % every == 0
    (params, opt_state), stats, norms = _updates(state, settings, micro, at_end)
    made = jnp.isfinite(norms)
    history = History(
        accuracy=jnp.mean(judged.reward),
        rechecked=jnp.mean(judged.rechecked),
        entropy=_value(stats["entropy"]),
        clipped=_value(stats["clipped"]),
        clipped_rare=_value(stats["clipped_rare"]),
        ratio_max=jnp.max(stats["ratio_max"].max),
        kl=_value(stats["kl_k3"]),
        grad_norm=jnp.sum(jnp.where(made, norms, 0.0)) / jnp.maximum(jnp.sum(made), 1),
        gap=jnp.sum(gap * judged.written) / jnp.sum(judged.written),
        gap_max=jnp.max(jnp.where(judged.written, gap, 0.0)),
        groups=jnp.sum(useful),
    )
    return State(params, opt_state, key), history


def _updates(state: State, settings: Settings, micro: Any, at_end: Array) -> Any:
    """Parameters and optimizer state after all updates; statistics and gradient norm (NaN: no update) of each
    micro-batch."""

    def objective(tokens: Tokens) -> Surrogate:
        branches = [arm.objective for arm in ARMS.values()]
        return jax.lax.switch(settings.arm, branches, tokens)

    def loss(params: Params, m: Any) -> tuple[Array, Any]:
        logp, entropy = policy.log_probs(params, m["tokens"], m["routes"])
        taken = (objective, logp, m["old_logp"], m["advantage"], m["mask"])
        value, stats = policy_loss(*taken, m["weight"], correction=m["correction"])
        rare = (m["tokens"][:, tasks.PROMPT :] == tasks.RECHECK) & m["mask"]
        _, of_rare = policy_loss(*taken, rare.astype(jnp.float32))
        kept = {"clipped": stats["clipped"], "ratio_max": stats["ratio_max"], "kl_k3": stats["kl_k3"]}
        return value, kept | {"clipped_rare": of_rare["clipped"], "entropy": Mean.of(entropy, m["weight"])}

    def one(carry: Any, x: Any) -> Any:
        params, opt_state, summed, count = carry
        m, last = x
        grads, stats = jax.grad(loss, has_aux=True)(params, m)
        summed = jax.tree.map(jnp.add, summed, grads)
        count = count + jnp.sum(m["mask"])
        norm = optax.tree.norm(summed)
        make = last & (count > 0) & jnp.isfinite(norm)
        steps, new_state = OPTIMIZER.update(summed, opt_state, params)
        new_params = jax.tree.map(lambda p, s: p - settings.learning_rate * s, params, steps)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(make, new, old), (new_params, new_state), (params, opt_state)
        )
        summed = jax.tree.map(lambda g: jnp.where(last, 0.0, g), summed)
        return (params, opt_state, summed, jnp.where(last, 0, count)), (stats, jnp.where(make, norm, jnp.nan))

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    carry = (state.params, state.opt_state, zeros, jnp.zeros((), jnp.int32))
    (params, opt_state, _, _), (stats, norms) = jax.lax.scan(one, carry, (micro, at_end))
    return (params, opt_state), stats, norms


def dealt(useful: Bool[Array, " groups"], updates: Int[Array, ""]) -> Int[Array, " groups"]:
    """The group in each slot, -1 for none; update u has the slots u * G / updates onwards.

    As `m1jax.rl.prepare` deals them out: the useful ones in their order, whole, as evenly as possible; one update per
    group where there are fewer groups than updates.
    """
    total = len(useful)
    count = jnp.sum(useful)
    parts = jnp.clip(count, 1, updates)
    each, more = count // parts, count % parts
    rank = jnp.cumsum(useful) - 1
    longer = more * (each + 1)
    part = jnp.where(rank < longer, rank // (each + 1), more + (rank - longer) // jnp.maximum(each, 1))
    first = part * each + jnp.minimum(part, more)
    slot = part * (total // updates) + rank - first
    return jnp.full(total, -1).at[jnp.where(useful, slot, total)].set(jnp.arange(total), mode="drop")


def advantages(
    rewards: Float[Array, "groups samples"], useful: Bool[Array, " groups"], *, over_batch: bool = False
) -> Float[Array, "groups samples"]:
    """(R - the group's mean) / standard deviation of that, over the group or over all useful groups; zero for the
    others."""
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    if over_batch:
        count = jnp.maximum(jnp.sum(useful) * rewards.shape[1], 1)
        std = jnp.sqrt(jnp.sum(jnp.where(useful[:, None], centred**2, 0.0)) / count)
    else:
        std = jnp.std(rewards, axis=1, keepdims=True)
    return jnp.where(useful[:, None], centred / jnp.where(std == 0, 1.0, std), 0.0)


def prompt_mean(
    lengths: Int[Array, "groups samples"], slots: Int[Array, " groups"], updates: Int[Array, ""]
) -> Float[Array, " groups"]:
    """What a token of each group counts: mean over a prompt's tokens, then over the prompts of its update."""
    total = len(slots)
    update = jnp.arange(total) // (total // updates)
    there = (slots >= 0).astype(jnp.int32)
    prompts = jnp.zeros(total, jnp.int32).at[update].add(there)[update]
    of_group = jnp.ones(total, jnp.int32).at[jnp.where(slots >= 0, slots, total)].set(prompts, mode="drop")
    return 1.0 / (jnp.sum(lengths, axis=1) * of_group)


def _rounding(p: Array) -> Array:
    # A cast there and back counts as exact to XLA on a GPU, which then finds the error to be zero.
    return jax.lax.reduce_precision(p, exponent_bits=8, mantissa_bits=7) - p


def _value(statistic: Mean) -> Array:
    """Over all micro-batches; NaN where nothing was counted."""
    count = jnp.sum(jnp.asarray(statistic.count))
    return jnp.sum(jnp.asarray(statistic.sum)) / jnp.where(count == 0, jnp.nan, count)
