"""Many small models trained at once: side by side on an accelerator, one after another on a CPU."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cispo_vs_rivals import loop, policy, tasks
from experiments.cispo_vs_rivals.loop import History, Settings, State
from experiments.cispo_vs_rivals.policy import Params

START = 1000
"""added to a seed for the key of its start"""


def over_models(function: Callable[..., Any]) -> Callable[..., Any]:
    """Its results for every entry of the arguments' leading axis.

    XLA:CPU's batched products of such small matrices are several times slower than as many single ones.
    """
    if jax.default_backend() == "cpu":
        return lambda *arguments: jax.lax.map(lambda each: function(*each), arguments)
    return jax.vmap(function)


@functools.partial(jax.jit, static_argnums=1)
def _starts(seeds: jax.Array, steps: int) -> Params:
    return over_models(lambda seed: policy.start(jax.random.key(START + seed), steps))(seeds)


def starts(seeds: Sequence[int], steps: int, file: Path) -> dict[int, Params]:
    """The supervised start of every seed, from the file where it is there already."""
    structure = jax.tree.structure(jax.eval_shape(lambda: policy.fresh(jax.random.key(0))))
    stored = dict(np.load(file)) if file.exists() else {}
    missing = [seed for seed in seeds if f"{seed}.{steps}.0" not in stored]
    if missing:
        found = jax.tree.leaves(jax.device_get(_starts(jnp.array(missing), steps)))
        stored |= {f"{s}.{steps}.{i}": x[n] for n, s in enumerate(missing) for i, x in enumerate(found)}
        np.savez(file, **stored)
    count = structure.num_leaves
    return {s: jax.tree.unflatten(structure, [stored[f"{s}.{steps}.{i}"] for i in range(count)]) for s in seeds}


@jax.jit
def recheck_accuracy(params: Params) -> jax.Array:
    """Of every model, on the task RECHECKS: probability of the right last sum once all before it stands there."""

    def one(params: Params) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), 1024)
        tokens, _ = jax.vmap(tasks.demonstration, (0, None))(keys, jnp.array(tasks.RECHECKS))
        logp, _ = policy.log_probs(params, tokens)
        rechecks = tokens[:, tasks.PROMPT + 1] == tasks.RECHECK
        return jnp.mean(jnp.exp(logp[:, 5]), where=rechecks)

    return over_models(one)(params)


def stacked(params: Sequence[Params]) -> Params:
    """One tree, the models along the leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *params)


@jax.jit
def begin(params: Params, seeds: jax.Array) -> State:
    return jax.vmap(lambda p, seed: loop.begin(p, jax.random.key(seed)))(params, seeds)


@functools.partial(jax.jit, static_argnames=("batches", "replay"), donate_argnums=0)
def train(state: State, settings: Settings, *, batches: int, replay: bool = False) -> tuple[State, History]:
    """`loop.train` of every model; History is [models, batches]."""
    return over_models(functools.partial(loop.train, batches=batches, replay=replay))(state, settings)
