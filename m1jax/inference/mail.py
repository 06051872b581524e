"""The host's side of `pallas_kernels.mailbox`: memory of its own that decode programs read and write while they run."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Int32, UInt32

from pallas_kernels import mailbox
from pallas_kernels.mailbox import Layout


class Mailbox:
    """For programs of so many rows.

    Args:
        words: of a row of an answer.
        device: where these programs run.
    """

    def __init__(self, rows: int, words: int, device: jax.Device) -> None:
        self.layout = Layout(rows, words)
        pinned = SingleDeviceSharding(device, memory_kind=_kind(device))
        # Of JAX's memory only the place is used, which it keeps as long as the array is here.
        self._array = jax.block_until_ready(jax.device_put(np.zeros(self.layout.size, np.uint32), pinned))
        place = self._array.unsafe_buffer_pointer()
        self._memory = mailbox.at(place, self.layout)
        with jax.default_device(device):
            self.address = jnp.array([place & _WORD, place >> 32], jnp.uint32)
        """uint32 [2], as `pallas_kernels.mailbox` wants it"""
        self._number = 0

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
            RuntimeError: it has not.
        """
        until = time.monotonic() + mailbox.SECONDS
        while not (self._memory.numbers == number & _WORD).all():
            if time.monotonic() > until:
                raise RuntimeError(f"a decode program has said nothing for {mailbox.SECONDS} s")
            time.sleep(0)
        return self._memory.told.copy()


_WORD = 0xFFFFFFFF


def _kind(device: jax.Device) -> str:
    """Of memory that lies with the host, where the device may look into it."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    return "pinned_host" if "pinned_host" in kinds and device.platform == "gpu" else "unpinned_host"
