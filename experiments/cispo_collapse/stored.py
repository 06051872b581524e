"""Where a block of runs is, so that a second call goes on from it."""

from pathlib import Path

import jax
import numpy as np

from experiments.cispo_vs_rivals.loop import History, State


def save(file: Path, state: State, history: History) -> None:
    """Whole or not at all."""
    leaves = jax.tree.leaves(jax.device_get(state._replace(key=jax.random.key_data(state.key))))
    made = file.with_suffix(".part.npz")
    np.savez(made, **{f"state.{n}": x for n, x in enumerate(leaves)}, **history._asdict())
    made.replace(file)


def load(file: Path, begin: State) -> tuple[State, History | None]:
    """The state and [models, batches] so far; `begin` and None where nothing was saved."""
    if not file.exists():
        return begin, None
    with np.load(file) as arrays:
        plain = begin._replace(key=jax.random.key_data(begin.key))
        count = jax.tree.structure(plain).num_leaves
        state: State = jax.tree.unflatten(jax.tree.structure(plain), [arrays[f"state.{n}"] for n in range(count)])
        history = History(*(arrays[name] for name in History._fields))
    return state._replace(key=jax.random.wrap_key_data(state.key)), history
