"""A model small enough to compile on many meshes, and its loss, gradients and tokens on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax.config import ModelConfig
from m1jax.model import MiniMaxM1
from pallas_kernels import PADDING

B, T = 8, 32


class Problem:
    """A model, a packed batch, and what one device makes of them."""

    def __init__(self, periods: int, words: int = 64):
        self.config = ModelConfig(
            vocab_size=words,
            hidden_size=32,
            intermediate_size=16,
            layer_types=("lightning", "softmax") * periods,
            num_heads=8,
            num_kv_heads=4,
            head_dim=8,
            rotary_dim=4,
            num_experts=4,
            experts_per_token=2,
            shared_intermediate_size=8,
            initializer_range=0.2,  # enough for every parameter to matter
        )
        self.graph, self.params = nnx.split(MiniMaxM1(self.config, rngs=nnx.Rngs(0)))
        rng = np.random.default_rng(0)
        segments = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32)
        segments[0, -5:] = segments[3, -1:] = PADDING
        self.batch = {
            "tokens": rng.integers(0, words, (B, T)).astype(np.int32),
            "targets": rng.integers(0, words, (B, T)).astype(np.int32),
            "segment_ids": segments,
        }
        self.loss, self.grads = jax.jit(jax.value_and_grad(self.loss_fn))(self.params, self.batch)

    def loss_fn(self, params, batch):
        """Every output that is trained on: log-probabilities, entropy and the balancing loss."""
        model: MiniMaxM1 = nnx.merge(self.graph, params)
        states = model.forward(batch["tokens"], segment_ids=batch["segment_ids"], remat="layers")
        log_probs, entropy = model.log_probs(states.hidden, batch["targets"], temperature=0.9)
        real = batch["segment_ids"] != PADDING
        terms = jnp.where(real, -log_probs - 0.1 * entropy + 0.1 * states.aux, 0.0)
        return jnp.sum(terms) / jnp.sum(real)


@pytest.fixture(scope="session")
def small():
    return Problem(periods=1)


@pytest.fixture(scope="session")
def deep():
    return Problem(periods=2)


@pytest.fixture(scope="session")
def prime():
    """The tiny tokenizer's vocabulary, which no axis divides."""
    return Problem(periods=1, words=263)
