"""The host's side of `pallas_kernels.mailbox`: memory of its own that decode programs read and write while they run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt32

from pallas_kernels import mailbox, target_platform
from pallas_kernels.mailbox import Layout


class Mailbox:
    """For programs of so many rows. Whoever starts one must keep it until its last message has come.

    Args:
        words: of a row of an answer.
        beside: an array on the device where these programs run.
    """

    def __init__(self, rows: int, words: int, beside: jax.Array) -> None:
        self.layout = Layout(rows, words)
        kind = "pinned_host" if target_platform() == "gpu" else "unpinned_host"
        memory = jax.device_put(np.zeros(self.layout.size, np.uint32), beside.sharding.with_memory_kind(kind))
        # Of JAX's memory only the place is used, which it keeps as long as the array is here.
        self._array = jax.block_until_ready(memory)
        place = self._array.unsafe_buffer_pointer()
        self._memory = mailbox.at(place, self.layout)
        with jax.default_device(next(iter(beside.devices()))):
            self.address = jnp.array([place & _WORD, place >> 32], jnp.uint32)
        """uint32 [2], as `pallas_kernels.mailbox` wants it"""
        self._number, self._closed = 0, False

    @property
    def answers(self) -> UInt32[np.ndarray, "rows words"]:
        """To be filled before `answer`."""
        return self._memory.answers

    def numbers(self, many: int) -> int:
        """The first of so many messages, an int32. They go on where these end."""
        first = self._number + 1
        self._number += many
        return (first + 2**31) % 2**32 - 2**31

    def answer(self, number: int) -> None:
        """What is written there is the answer to the question of this number, and to those before."""
        self._memory.answered[0] = number & _WORD

    def hear(self, number: int) -> Int32[np.ndarray, " rows"]:
        """What the message of this number says of each row, once it has come.

        Raises:
            RuntimeError: it will not, because the mailbox is closed.
        """
        while not (self._memory.numbers == number & _WORD).all():
            if self._closed:
                raise RuntimeError("the decode program that asks by mail has failed")
            time.sleep(0)
        return self._memory.told.copy()

    @contextlib.contextmanager
    def closed_by_failure(self) -> Iterator[None]:
        """Around whatever starts a program, or waits for it: nobody waits for a message of one that has failed."""
        try:
            yield
        except BaseException:
            self._closed = True
            raise


_WORD = 0xFFFFFFFF
