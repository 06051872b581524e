"""Small models of every shape that the tests of the model share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig
from m1jax.config import LIGHTNING, SOFTMAX

SMALL = dataclasses.replace(
    ModelConfig.preset("m1-tiny"), vocab_size=64, hidden_size=24, intermediate_size=32, initializer_range=0.2
)


def small_config(pattern: str = "LS", **changes) -> ModelConfig:
    kinds = tuple({"L": LIGHTNING, "S": SOFTMAX}[letter] for letter in pattern)
    return dataclasses.replace(SMALL, layer_types=kinds, **changes)


@functools.cache
def small_model(pattern: str = "LS", seed: int = 0, **changes) -> MiniMaxM1:
    """The same object for all who ask for it: not to be changed."""
    return MiniMaxM1(small_config(pattern, **changes), rngs=nnx.Rngs(seed))


def random_tokens(seed: int, *shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, SMALL.vocab_size, jnp.int32)


@pytest.fixture(scope="session")
def model() -> MiniMaxM1:
    return small_model("LSLS")
