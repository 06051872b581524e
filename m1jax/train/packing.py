"""Sequences packed into rows: several short ones share a row, told apart by segment ids (no cross-talk, positions
restart)."""

from collections.abc import Sequence

import numpy as np

from m1jax.train.batch import B, Batch


def example(prompt: Sequence[int], response: Sequence[int]) -> Batch:
    """One prompt and its response, of which the response is learned.

    Args:
        prompt: token ids, at least one.
        response: token ids, at least one.

    Returns:
        Fields [len(prompt) + len(response) - 1].
    """
    if not prompt or not response:
        raise ValueError("packing.example: prompt and response need at least one token each")
    ids = np.asarray([*prompt, *response], np.int32)
    return masked(ids, np.arange(len(ids)) >= len(prompt))


def masked(ids: np.ndarray, learned: np.ndarray) -> Batch:
    """A sequence of which some tokens are learned, each with weight one.

    Args:
        ids: [n + 1] int32, at least two.
        learned: [n + 1] bool.

    Returns:
        Fields [n].
    """
    return Batch.of(
        tokens=ids[:-1],
        targets=ids[1:],
        segment_ids=np.zeros(len(ids) - 1, np.int32),
        mask=learned[1:],
        weight=learned[1:].astype(np.float32),
    )


def pack(examples: Sequence[B], row_length: int) -> B:
    """First-fit decreasing: longest example first, each into the first row with room. Deterministic.

    Args:
        examples: at least one, fields [n]; none longer than row_length.
        row_length: positions per row.

    Returns:
        Fields [rows, row_length]; `segment_ids` counts 0, 1, ... along a row.

    Raises:
        ValueError: an example is longer than a row, or there is none.
    """
    if not examples:
        raise ValueError("packing.pack: no examples")
    order = sorted(range(len(examples)), key=lambda i: -examples[i].positions)
    longest = examples[order[0]].positions
    if longest > row_length:
        raise ValueError(f"packing.pack: an example has {longest} positions, a row {row_length}")
    rows: list[list[int]] = []
    free: list[int] = []
    for i in order:
        size = examples[i].positions
        row = next((r for r, room in enumerate(free) if room >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(row_length)
        rows[row].append(i)
        free[row] -= size
    packed = examples[0].emptied((len(rows), row_length))
    columns = {name: np.asarray(values) for name, values in packed.fields().items()}
    for r, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members):
            stop = start + examples[i].positions
            for name, values in columns.items():
                values[r, start:stop] = segment if name == "segment_ids" else getattr(examples[i], name)
            start = stop
    return packed


def micro_batches(packed: B, rows: int, count: int | None = None) -> B:
    """Cut packed rows into micro-batches of a fixed shape, filling up with empty rows.

    Args:
        packed: fields [R, L] from `pack`.
        rows: rows per micro-batch.
        count: number of micro-batches in the result (None: as many as are filled). Fixed, it gives every update one
            compiled shape.

    Returns:
        Fields [count, rows, L].

    Raises:
        ValueError: the rows do not fit into count micro-batches.
    """
    filled = len(packed.tokens)
    needed = -(-filled // rows)
    count = needed if count is None else count
    if needed > count:
        raise ValueError(
            f"packing.micro_batches: {filled} rows need {needed} micro-batches of {rows}, there are {count}"
        )
    padded = packed.emptied((count * rows, packed.positions))
    for name, values in padded.fields().items():
        np.asarray(values)[:filled] = getattr(packed, name)
    return padded.map(lambda x: x.reshape(count, rows, *x.shape[1:]))
