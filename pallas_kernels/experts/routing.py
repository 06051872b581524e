"""Which rows belong to which expert: the assignments of tokens sorted by expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FEW = 1024
"""Assignments up to which each is compared with all before it: one program on a GPU, where a cumulative sum is several
slow ones."""


class Plan(NamedTuple):
    """Assignments sorted by expert: expert e has the rows start[e] : start[e] + size[e], the first ones used."""

    token: jax.Array  # [P] of each row; the number of tokens where there is none
    row: jax.Array  # [N,k] of each assignment; P where its expert is not here
    start: jax.Array  # [E]
    size: jax.Array  # [E] rows, a multiple of `block`

    @property
    def length(self) -> int:
        """P"""
        return self.token.size

    def some_rows(self, x: jax.Array) -> jax.Array:
        """[N,D] -> [P,D]: each row its token; any token where there is none."""
        return x.at[self.token].get(mode="clip")

    def rows(self, x: jax.Array) -> jax.Array:
        """[N,D] -> [P,D]: each row its token; zeros where there is none."""
        return x.at[self.token].get(mode="fill", fill_value=0)

    def spread(self, values: jax.Array) -> jax.Array:
        """[N,k] -> [P]: each row the value of its assignment; zero where there is none."""
        return jnp.zeros(self.token.shape, values.dtype).at[self.row].set(values, mode="drop")

    def gather(self, rows: jax.Array) -> jax.Array:
        """[P,...] -> [N,k,...]: each assignment its row; zeros where its expert is not here."""
        return rows.at[self.row].get(mode="fill", fill_value=0)


def plan(routes: jax.Array, experts: int, block: int = 1) -> Plan:
    """Sorts `routes` [N,k], whose ids outside 0..experts-1 count for nothing.

    block: every expert's rows are filled up to a multiple of so many, so that no block of rows has two experts.
    """
    tokens, k = routes.shape
    assignments = routes.size
    flat = routes.reshape(-1)
    chosen = (flat[:, None] == jnp.arange(experts)).astype(jnp.int32)
    if assignments <= FEW:
        count = jnp.sum(chosen, axis=0)
        rank = jnp.arange(assignments)
        so_far = jnp.sum((flat == flat[:, None]) & (rank <= rank[:, None]), axis=1, dtype=jnp.int32)[:, None]
    else:
        so_far = jnp.cumsum(chosen, axis=0)
        count = so_far[-1]
    size = -(-count // block) * block
    start = jnp.cumsum(size) - size
    length = room(assignments, experts, block)
    row = jnp.where(chosen.any(1), jnp.sum(chosen * (start + so_far - 1), axis=1), length)
    token = jnp.full(length, tokens).at[row].set(jnp.arange(assignments) // k, mode="drop", unique_indices=True)
    return Plan(token, row.reshape(routes.shape), start, size)


def room(assignments: int, experts: int, block: int) -> int:
    """P: no more blocks are in use, however the assignments fall."""
    return assignments if block == 1 else (assignments // block + min(experts, assignments)) * block
