"""How large an engine is made."""

import jax.numpy as jnp
import pytest

from m1jax import ModelConfig, UserError
from m1jax.inference.memory import capacity_for

CONFIG = ModelConfig.preset("m1-tiny")


def test_too_little_memory_for_one_sequence_is_refused():
    with pytest.raises(UserError, match="4 rows and one sequence of 4096 tokens need"):
        capacity_for(CONFIG, jnp.float32, rows=4, max_length=4096, memory=2**20)


def test_the_smallest_prefill_is_always_allowed_and_pages_hold_a_sequence():
    capacity = capacity_for(CONFIG, jnp.float32, rows=4, max_length=1000, memory=2**26)
    assert capacity.stall >= min(rows * tokens for rows, tokens in capacity.prefill)
    assert capacity.pages >= capacity.pages_for(1000)
    assert capacity.decode[-1] == capacity.rows == 4
