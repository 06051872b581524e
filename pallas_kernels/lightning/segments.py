"""Packed sequences: what segment ids and padding mean."""

import jax
import numpy as np

PADDING = int(np.iinfo(np.int32).max)
"""The segment id of tokens that are not there. As the largest id it can only stand at the end of a row."""


def is_real(segment_ids: jax.Array) -> jax.Array:
    """Which tokens are there (bool, the shape of segment_ids)."""
    return segment_ids != PADDING
