"""The memory through which a program and its host talk to each other, and where what lies in it."""

import ctypes
import math
from typing import NamedTuple

import numpy as np

SECONDS = 10
"""After which a host that has not answered will not."""


class Layout(NamedTuple):
    """Of the memory, in words of 32 bits: the number of the host's last answer; what rows have told, each a word and
    the number of its message, which are written at once; the host's answers, a row of words each."""

    rows: int
    words: int
    """of a row of an answer"""

    @property
    def told(self) -> int:
        """The first pair's place."""
        return _LINE

    @property
    def answers(self) -> int:
        """The first answer's place."""
        return self.told + math.ceil(2 * self.rows / _LINE) * _LINE

    @property
    def size(self) -> int:
        return self.answers + self.rows * self.words


class Memory(NamedTuple):
    """What lies there. Numbers are counted round, as integers of 32 bits are."""

    answered: np.ndarray
    """uint32 [1]"""
    told: np.ndarray
    """int32 [rows], the words"""
    numbers: np.ndarray
    """uint32 [rows], of these messages"""
    answers: np.ndarray
    """uint32 [rows,words]"""


def at(address: int, layout: Layout) -> Memory:
    """Views of the host's memory from an address on."""
    words = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint32)), (layout.size,))
    pairs = words[layout.told : layout.told + 2 * layout.rows].reshape(layout.rows, 2)
    answers = words[layout.answers :].reshape(layout.rows, layout.words)
    return Memory(words[:1], pairs.view(np.int32)[:, 0], pairs[:, 1], answers)


_LINE = 32
