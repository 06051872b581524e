"""How large an engine can be on the devices that are here."""

from __future__ import annotations

import dataclasses
import os

import jax

from m1jax.config import ModelConfig
from m1jax.errors import UserError
from m1jax.inference.capacity import Capacity
from m1jax.inference.runner import parts
from m1jax.model.cache import key_value_bytes, state_bytes
from m1jax.sharding import ambient_mesh

PAGE_SIZE = 128
"""Tokens: what a decoding kernel reads at a time."""
SHARE = 0.8
"""Of the memory that is free beside the weights, for states, keys and values; the rest is for what programs need."""
KEPT = 0.25
"""Of that, for the states of kept prefixes."""


def capacity_for(
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    *,
    rows: int | None = None,
    max_length: int | None = None,
    memory: int | None = None,
) -> Capacity:
    """Sizes of an engine on the ambient mesh, or the default device.

    Args:
        rows: sequences in work at once, of all parts together; None: 32 on a CPU, else 256, or what half of the memory
            has states for.
        max_length: of a sequence in tokens; None: the model's, or what the pages hold.
        memory: bytes of each device for states, keys and values; None: most of what is free once another copy of the
            weights is there, on a CPU a quarter of the free memory.

    Raises:
        UserError: not even one sequence of that length fits.
    """
    cpu = jax.default_backend() == "cpu"
    mesh, several = ambient_mesh(), parts()
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    memory = _free_memory() if memory is None else memory
    state = state_bytes(config) // tensor
    page = PAGE_SIZE * key_value_bytes(config, dtype) // tensor
    each = max(1, (rows or (32 if cpu else 256) * several) // several)
    if rows is None and state:
        each = max(1, min(each, memory // 2 // state))
    snapshots = min(each, int(KEPT * memory) // state) if state else each
    left = memory - (each + snapshots) * state
    longest = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
    pages = each * -(-longest // PAGE_SIZE) + snapshots
    if page:
        pages = min(pages, left // page)
    if max_length is None:
        longest = min(longest, pages * PAGE_SIZE)
    if left < 0 or pages < -(-longest // PAGE_SIZE) or longest < 1:
        need = each * state + max(1, -(-longest // PAGE_SIZE)) * page
        raise UserError(
            f"engine: {each} rows and one sequence of {longest} tokens need {need / 2**20:.0f} MiB of states, keys and "
            f"values, there are {memory / 2**20:.0f}; take fewer rows, a smaller max_length or more memory"
        )
    return Capacity(
        rows=each,
        max_length=longest,
        page_size=PAGE_SIZE,
        pages=pages,
        snapshots=snapshots,
        steps=8,
        decode=_powers(each),
        prefill=((1, 32), (1, 256), (8, 64)) if cpu else ((1, 128), (8, 128), (16, 64), (1, 1024), (4, 1024)),
        stall=32 if cpu else 1024,
        parts=several,
        ahead=not cpu and jax.process_count() == 1,
    )


def batch_capacity(
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    *,
    prompts: int,
    samples: int,
    prompt_tokens: int,
    new_tokens: int,
) -> Capacity:
    """Sizes of an engine that serves one batch of requests. Powers of two: a handful of programs serve all batches.

    Args:
        prompts, samples: requests, and samples of each.
        prompt_tokens, new_tokens: the most that one of them has and writes.

    Raises:
        UserError: one sequence of that length does not fit.
    """
    cpu, several = jax.default_backend() == "cpu", parts()
    rows = min(_power(-(-prompts * samples // several)), 64 if cpu else 256)
    length = min(_power(prompt_tokens) + _power(new_tokens), config.max_position_embeddings)
    capacity = capacity_for(config, dtype, rows=rows * several, max_length=length)
    chunk = min(_power(prompt_tokens), 256 if cpu else 1024)
    at_once = min(_power(-(-prompts // several)), max(1, (2048 if cpu else 8192) // chunk))
    return dataclasses.replace(
        capacity,
        decode=(rows,),
        prefill=tuple(sorted({(1, chunk), (at_once, chunk)})),
        stall=at_once * chunk,
    )


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _free_memory() -> int:
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is None or "bytes_limit" not in statistics:  # a CPU says nothing
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return int(SHARE * (statistics["bytes_limit"] - statistics["bytes_in_use"]))


def _powers(rows: int) -> tuple[int, ...]:
    """Sizes of decode programs: 1, 4, 16 and so on, and all rows."""
    return (*(4**n for n in range(10) if 4**n < rows), rows)
