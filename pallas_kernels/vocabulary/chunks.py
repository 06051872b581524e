"""Tokens in chunks, so that no more scores are alive at once than memory likes."""

import jax
import jax.numpy as jnp

ELEMENTS = 2**27
"""Scores alive at once: 512 MiB of float32."""


class Chunks:
    """How N tokens are cut into chunks of equal size."""

    def __init__(self, tokens: int, words: int) -> None:
        self.tokens = tokens
        self.count = -(-tokens // max(1, ELEMENTS // words))
        size = -(-tokens // self.count)
        self.size = size if self.count == 1 else -(-size // 8) * 8

    def split(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """[N, ...] -> [chunks, size, ...], zeros behind."""
        missing = self.count * self.size - self.tokens
        padded = (jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)
        return tuple(x.reshape(self.count, self.size, *x.shape[1:]) for x in padded)

    def join(self, arrays):
        """The inverse, of every array of a tree."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: self.tokens], arrays)
