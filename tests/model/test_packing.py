"""Packed sequences: logits, loss, gradients and balancing loss are those of the sequences one by one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import PADDING
from tests.model.conftest import random_tokens, small_model

MODELS = {pattern: small_model(pattern) for pattern in ("LSLS", "SLL")}


def packed(lengths: list[int], seed: int, time: int) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    sequences = [random_tokens(seed + i, 1, n) for i, n in enumerate(lengths)]
    tokens = jnp.concatenate([*sequences, random_tokens(seed, 1, time - sum(lengths))], axis=1)
    ids = np.full((1, time), PADDING, np.int32)
    ids[0, : sum(lengths)] = np.repeat(np.arange(len(lengths)) * 3, lengths)  # ids only need to rise
    return sequences, tokens, jnp.array(ids)


@settings(max_examples=10)
@given(
    name=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.sampled_from([1, 9]), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_logits_and_balancing_loss(name, lengths, seed):
    model = MODELS[name]
    sequences, tokens, ids = packed(lengths, seed, 40)
    logits, start = model(tokens, segment_ids=ids), 0
    aux = model.forward(tokens, segment_ids=ids).aux
    for sequence in sequences:
        part = slice(start, start + sequence.shape[1])
        np.testing.assert_allclose(logits[:, part], model(sequence), atol=1e-4)
        np.testing.assert_allclose(aux[:, part], model.forward(sequence).aux, rtol=1e-5)
        start = part.stop
    assert not np.any(aux[:, start:])


def loss(parameters, graph, tokens, ids):
    """Summed negative log-likelihood within segments, plus the balancing loss of every token."""
    model = nnx.merge(graph, parameters)
    out = model.forward(tokens[:, :-1], segment_ids=ids[:, :-1])
    log_prob, _ = model.log_probs(out.hidden, tokens[:, 1:])
    within = (ids[:, :-1] == ids[:, 1:]) & (ids[:, 1:] != PADDING)
    return -jnp.sum(jnp.where(within, log_prob, 0.0))


def test_training_loss_and_gradients():
    model = MODELS["SLL"]
    graph, parameters = nnx.split(model)
    sequences, tokens, ids = packed([9, 4, 9], 5, 40)
    gradients = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = jax.device_get(gradients(parameters, graph, tokens, ids))
    alone = [jax.device_get(gradients(parameters, graph, s, jnp.zeros_like(s))) for s in sequences]
    np.testing.assert_allclose(value, sum(v for v, _ in alone), rtol=1e-5)
    total = jax.tree.map(lambda *g: sum(g), *[g for _, g in alone])
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(total), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs), jax.tree_util.keystr(path)
