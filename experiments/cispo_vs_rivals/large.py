"""The primary comparison with some 36 M parameters on one GPU. See README.md beside this file.

python -m experiments.cispo_vs_rivals.large [--minutes N] [--seeds N ...] [--out FOLDER] [--starts FOLDER] [--smoke]
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.cispo_vs_rivals import many, policy, report, run, tasks
from experiments.cispo_vs_rivals.policy import Params
from experiments.cispo_vs_rivals.results import Job, Results
from m1jax.config import ModelConfig
from m1jax.disk import write_atomically
from pallas_kernels.experts import reference

LARGE = dataclasses.replace(
    policy.CONFIG,
    hidden_size=512,
    intermediate_size=256,
    layer_types=("lightning",) * 7 + ("softmax",),
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    rotary_dim=32,
    num_experts=8,
    initializer_range=0.025,  # the small model's, for 16 times the width
    lightning_alpha=16**0.25,
    softmax_alpha=16**0.25,
    mlp_alpha=16**0.25,
)
SMOKE = dataclasses.replace(LARGE, hidden_size=32, intermediate_size=16, head_dim=8, rotary_dim=8, num_heads=4)
ARMS = ("dapo", "cispo")
START_RATE, START_BATCH = 5e-4, 64
LEARNED = 0.95
"""probability of the right last sum, from which a start has learned the sums"""


@dataclasses.dataclass(frozen=True)
class Size:
    model: ModelConfig = LARGE
    start_steps: int = 300
    """of a piece of the start; then it is asked whether the sums are learned"""
    start_pieces: int = 5
    """at most"""
    groups: tuple[tuple[int, ...], ...] = ((100, *range(8)), tuple(range(8, 17)))
    """seeds whose starts are made side by side; the first tunes, the last only makes the groups equally large"""
    loop: run.Size = dataclasses.field(
        default_factory=lambda: run.Size(batches=40, rates=(1e-5, 3e-5, 1e-4, 3e-4), tuning_seeds=(100,), updates=(16,))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    minutes: float | None = None
    """no block of runs is begun after so many"""
    width: int = 8
    """runs of a block"""
    seeds: tuple[int, ...] = ()
    """to run; without them all"""
    group: int = 8
    """of `seeds`, whose starts are made side by side"""
    out: Path = run.HERE / "results-large"
    starts: Path = run.HERE / "results-large"
    """folder of the starts: 140 MB each"""
    smoke: bool = False
    """a tiny size, to see that all of it works"""


def main(config: Config) -> None:
    size = Size(SMOKE, 3, 2, ((100, 0), (1, 2)), run.Size(2, 3, (1e-3, 3e-3), (100,), 1, 2, (16,)))
    size = size if config.smoke else Size()
    for folder in (config.out, config.starts):
        folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def in_time() -> bool:
        return config.minutes is None or time.monotonic() - begun < 60 * config.minutes

    tuning, runs = Results(config.out, "tuning"), Results(config.out, "runs")
    some = [config.seeds[n : n + config.group] for n in range(0, len(config.seeds), config.group)]
    with policy.of(size.model), policy.portable():
        how = run.Config(width=config.width, out=config.out, minutes=config.minutes)
        for group in some or size.groups:
            if not in_time():
                break
            starts, told = starts_of(group, size, config.starts)
            write_atomically(config.out / f"starts-{group[0]}.json", json.dumps(told) + "\n")
            print(f"starts of {group}: {time.monotonic() - begun:.0f} s", flush=True)
            jobs = [job for job in tuning_jobs(size.loop) if job.seed in group]
            run.execute(jobs, tuning, starts, size.loop, how, in_time)
            seeds = [seed for seed in group if seed < size.loop.primary_seeds]
            run.execute(main_jobs(seeds, tuning), runs, starts, size.loop, how, in_time)
            print(f"runs of {group}: {time.monotonic() - begun:.0f} s", flush=True)
            write_report(runs, tuning, size, config.out)
    write_report(runs, tuning, size, config.out)


def write_report(runs: Results, tuning: Results, size: Size, out: Path) -> None:
    text = report.table(runs, tuning, size.loop.rates)
    (out / "table.md").write_text(text)
    report.picture(runs, out)
    print(text, flush=True)


def tuning_jobs(size: run.Size) -> list[Job]:
    cells = itertools.product(ARMS, size.rates, size.tuning_seeds)
    return [Job("recheck", arm, 16, rate, seed) for arm, rate, seed in cells]


def main_jobs(seeds: Sequence[int], tuning: Results) -> list[Job]:
    """Seed by seed, so that what is there when time runs out is paired."""
    rates = {arm: tuning.chosen("recheck", arm, 16) for arm in ARMS}
    cells = itertools.product(seeds, ARMS)
    return [Job("recheck", arm, 16, rate, seed) for seed, arm in cells if (rate := rates[arm]) is not None]


def starts_of(group: Sequence[int], size: Size, folder: Path) -> tuple[dict[int, Params], dict[str, Any]]:
    """The supervised starts of a group of seeds, and how they were made; from the folder where they are there."""
    structure = jax.tree.structure(jax.eval_shape(lambda: policy.fresh(jax.random.key(0))))
    told_file = folder / f"made-{group[0]}.json"
    if not told_file.exists():
        state = fresh(jnp.array(group))
        steady = jnp.full(len(group), START_RATE)
        made = 0
        for made in range(1, size.start_pieces + 1):
            state, loss = piece(state, steady, steady, steps=size.start_steps)
            worth = many.recheck_accuracy(state[0])
            print(f"{made} pieces, loss {loss.mean():.3f}, right {np.round(worth, 3).tolist()}", flush=True)
            if worth.min() >= LEARNED:
                break
        state, loss = piece(state, steady, jnp.zeros_like(steady), steps=size.start_steps)
        worth = many.recheck_accuracy(state[0])
        leaves = jax.tree.leaves(jax.device_get(state[0]))
        for n, seed in enumerate(group):
            np.savez(folder / f"{seed}.npz", *(leaf[n] for leaf in leaves))
        told = {"seeds": list(group), "right": worth.tolist(), "pieces": made + 1, "loss": float(loss.mean())}
        write_atomically(told_file, json.dumps(told) + "\n")
    found = {}
    for seed in group:
        with np.load(folder / f"{seed}.npz") as arrays:
            leaves = [arrays[f"arr_{n}"] for n in range(structure.num_leaves)]
        found[seed] = jax.tree.unflatten(structure, leaves)
    return found, json.loads(told_file.read_text())


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))
WARM = 50
"""updates over which the rate of a start rises"""


@jax.jit
def fresh(seeds: jax.Array) -> Any:
    """Parameters, optimizer state, number of updates and key, of every seed."""

    def one(seed: jax.Array) -> Any:
        key, key_fresh = jax.random.split(jax.random.key(many.START + seed))
        params = policy.fresh(key_fresh)
        return params, OPTIMIZER.init(params), jnp.zeros((), jnp.int32), key

    return many.over_models(one)(seeds)


@functools.partial(jax.jit, static_argnames="steps", donate_argnums=0)
def _piece(state: Any, first: jax.Array, last: jax.Array, *, steps: int) -> Any:
    def one(state: Any, first: jax.Array, last: jax.Array) -> Any:
        def loss(params: Params, key: jax.Array) -> jax.Array:
            keys = jax.random.split(key, START_BATCH)
            tokens, weight = jax.vmap(tasks.demonstration, (0, None))(keys, jnp.array(tasks.RECHECKS))
            return -jnp.sum(weight * policy.log_probs(params, tokens)[0]) / jnp.sum(weight)

        def step(state: Any, share: jax.Array) -> Any:
            params, opt_state, made, key = state
            value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(key, made))
            updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
            rate = (first + (last - first) * share) * jnp.minimum(1.0, (made + 1) / WARM)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, opt_state, made + 1, key), value

        state, values = jax.lax.scan(step, state, jnp.arange(steps) / steps)
        return state, jnp.mean(values[-25:])

    return many.over_models(one)(state, first, last)


def _experts(x: Any, w1: Any, w3: Any, w2: Any, routes: Any, weights: Any) -> jax.Array:
    """`reference.forward`, which insists on float32 products, without that."""
    share = jnp.sum(weights[:, :, None] * (routes[:, :, None] == jnp.arange(len(w1))), axis=1)
    up, gate = jnp.einsum("nd,efd->enf", x, w1), jnp.einsum("nd,efd->enf", x, w3)
    return jnp.einsum("enf,edf->nd", jax.nn.silu(up) * gate * share.T[:, :, None], w2)


def piece(state: Any, first: jax.Array, last: jax.Array, *, steps: int) -> tuple[Any, np.ndarray]:
    """So many more steps of every start, at rates that go from `first` to `last`; the loss of the last of them.

    Products are those of a GPU's matrix units: nothing here compares a sampler with a trainer.
    """
    with mock.patch.object(reference, "forward", _experts), jax.default_matmul_precision("tensorfloat32"):
        state, loss = _piece(state, first, last, steps=steps)
    return state, np.asarray(loss)


if __name__ == "__main__":
    main(tyro.cli(Config))
