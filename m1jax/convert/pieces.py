"""What a conversion is cut into: ranges of rows of official tensors, contiguous in source and target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from m1jax.weights.names import Tensor

PIECE_BYTES = 128 * 2**20


class Piece(NamedTuple):
    """Rows ``first:stop`` of a tensor (elements, where it has one dimension) and their place in the target."""

    tensor: Tensor
    first: int
    stop: int
    file: str
    start: int

    def nbytes(self, dtype: np.dtype) -> int:
        """How many bytes it has in a dtype."""
        return self.tensor.size // self.tensor.shape[0] * (self.stop - self.first) * dtype.itemsize


def rows_of_piece(tensor: Tensor, dtype: np.dtype) -> int:
    """Rows in a piece: the largest divisor of all rows that makes no more than PIECE_BYTES."""
    rows = tensor.shape[0]
    limit = max(1, PIECE_BYTES // (tensor.size // rows * dtype.itemsize))
    return next(n for n in range(min(rows, limit), 0, -1) if rows % n == 0)


def cut(tensor: Tensor, dtype: np.dtype) -> Iterator[tuple[int, int]]:
    """The rows (first, behind the last) of each piece of a tensor."""
    rows = rows_of_piece(tensor, dtype)
    for first in range(0, tensor.shape[0], rows):
        yield first, first + rows
