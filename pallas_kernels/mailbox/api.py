"""Questions to the host in the middle of a program, which stands still only where the answer is not there yet.

A callback holds up the device until the host has been woken, has copied what it is asked, and has started what comes
after its answer, and the host has nothing to do meanwhile. Here both only write into the same memory, the host's, and
look into it: a word tells what the host must know, whatever runs next is begun, and the answer is fetched where it is
needed.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ladder import Ladder
from pallas_kernels.mailbox.layout import Layout

LADDER = Ladder(
    op="mailbox",
    package="pallas_kernels.mailbox",
    implementations=("callback", "gpu"),
    preferred={"gpu": ("gpu",)},
    portable="callback",
)


def tell(address: jax.Array, number: jax.Array | int, words: jax.Array, layout: Layout) -> jax.Array:
    """Let the host know a word of each row.

    Args:
      address: uint32 [2], the low and the high half of the memory's, which is the host's, within the device's reach,
        and aligned to 8 bytes.
      number: int32 scalar, of this message.
      words: int32 [N].
      layout: of that memory.

    Returns:
      The words: what depends on them comes after they were told.
    """
    return _module().tell(address, jnp.asarray(number, jnp.int32), words, layout)


def ask(address: jax.Array, number: jax.Array | int, asks: jax.Array, after: jax.Array, layout: Layout) -> jax.Array:
    """The host's answer of this number, or of a later one, as soon as it is there.

    Args:
      address, number, layout: as in `tell`.
      asks: bool [N], the rows that wait for an answer.
      after: any array that is ready before this begins to wait.

    Returns:
      uint32 [N,words]: all bits set in rows that do not ask, none where there was no answer within `layout.SECONDS`.
    """
    return _module().ask(address, jnp.asarray(number, jnp.int32), asks, after, layout)


def _module():
    return LADDER.module(LADDER.choose("auto"))
