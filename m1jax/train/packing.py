"""Sequences packed into rows: several short ones share a row, told apart by segment ids (no cross-talk, positions
restart).

A sequence of n + 1 tokens becomes an `Example` of n positions: position i holds token i and predicts token i + 1. All
fields of a batch are aligned to the predicting position, so that `model.log_probs(hidden, targets)` needs no shift.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pallas_kernels import PADDING

Example = Mapping[str, np.ndarray]  # "tokens", "targets" [n] int32 and any number of float32 fields [n]


def example(prompt: Sequence[int], response: Sequence[int], **fields: np.ndarray | float) -> Example:
    """One prompt and its response.

    Args:
        prompt: token ids, at least one.
        response: token ids, at least one.
        **fields: a number or an array [len(response)] per response token; stored as float32, zero on the prompt.

    Returns:
        Arrays of length len(prompt) + len(response) - 1.
    """
    if not prompt or not response:
        raise ValueError("packing.example: prompt and response need at least one token each")
    tokens = np.asarray([*prompt, *response], np.int32)
    columns: dict[str, np.ndarray] = {"tokens": tokens[:-1], "targets": tokens[1:]}
    for name, value in fields.items():
        column = np.zeros(len(tokens) - 1, np.float32)
        column[len(prompt) - 1 :] = value
        columns[name] = column
    return columns


def masked(ids: np.ndarray, learned: np.ndarray) -> Example:
    """A sequence of which some tokens are learned.

    Args:
        ids: [n + 1] int32, at least two.
        learned: [n + 1] bool.

    Returns:
        Arrays of length n; weight is one where a learned token is predicted.
    """
    return {"tokens": ids[:-1], "targets": ids[1:], "weight": learned[1:].astype(np.float32)}


def pack(examples: Sequence[Example], row_length: int) -> dict[str, np.ndarray]:
    """First-fit decreasing: longest example first, each into the first row with room. Deterministic.

    Args:
        examples: at least one; none longer than row_length.
        row_length: positions per row.

    Returns:
        Every field as [rows, row_length] (zero where padded) and `segment_ids` [rows, row_length] int32: 0, 1, ...
        along a row, PADDING behind the last example.

    Raises:
        ValueError: an example is longer than a row, or there is none.
    """
    if not examples:
        raise ValueError("packing.pack: no examples")
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["tokens"]))
    longest = len(examples[order[0]]["tokens"])
    if longest > row_length:
        raise ValueError(f"packing.pack: an example has {longest} positions, a row {row_length}")
    rows: list[list[int]] = []
    free: list[int] = []
    for i in order:
        size = len(examples[i]["tokens"])
        row = next((r for r, room in enumerate(free) if room >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(row_length)
        rows[row].append(i)
        free[row] -= size
    packed = {name: np.zeros((len(rows), row_length), value.dtype) for name, value in examples[0].items()}
    packed["segment_ids"] = np.full((len(rows), row_length), PADDING, np.int32)
    for r, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members):
            stop = start + len(examples[i]["tokens"])
            for name, value in examples[i].items():
                packed[name][r, start:stop] = value
            packed["segment_ids"][r, start:stop] = segment
            start = stop
    return packed


def micro_batches(packed: Mapping[str, np.ndarray], rows: int, count: int | None = None) -> dict[str, np.ndarray]:
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
    filled = len(packed["segment_ids"])
    needed = -(-filled // rows)
    count = needed if count is None else count
    if needed > count:
        raise ValueError(
            f"packing.micro_batches: {filled} rows need {needed} micro-batches of {rows}, there are {count}"
        )
    batches = {}
    for name, value in packed.items():
        padded = np.full((count * rows, value.shape[1]), PADDING if name == "segment_ids" else 0, value.dtype)
        padded[:filled] = value
        batches[name] = padded.reshape(count, rows, value.shape[1])
    return batches
