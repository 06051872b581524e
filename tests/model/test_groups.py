"""A prompt computed once: what its continuations are, and every gradient, as if each had been computed whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax.model.groups import Side, continuations
from tests import tiny

PROMPTS, TIMES, ROOM, LONGEST = 2, 3, 7, 5


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    before, after = np.array([7, 4]), np.array([5, 2, 1, 3, 5, 4])
    prompts = [rng.integers(0, 250, n) for n in before]
    answers = [rng.integers(0, 250, n) for n in after]

    def side(rows, lengths, room):
        tokens = np.full((len(rows), room), 9, np.int32)  # what stands in the padding has no influence
        for row, values in zip(tokens, rows):
            row[: len(values)] = values
        return Side(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32))

    return prompts, answers, side(prompts, before, ROOM), side(answers, after, LONGEST)


def whole(model, prompts, answers, routes=None):
    """Each continuation by itself, padded to one shape."""
    rows = [np.concatenate([prompts[i // TIMES], answer]) for i, answer in enumerate(answers)]
    tokens = np.zeros((len(rows), ROOM + LONGEST), np.int32)
    for row, values in zip(tokens, rows):
        row[: len(values)] = values
    lengths = jnp.array([len(row) for row in rows], jnp.int32)
    hidden = model.forward(jnp.asarray(tokens), lengths=lengths, routes=routes).hidden
    starts = [len(prompts[i // TIMES]) for i in range(len(answers))]
    return [hidden[i, s : s + len(answer)] for i, (s, answer) in enumerate(zip(starts, answers))]


@pytest.fixture(scope="module")
def apart(case):
    """What the hidden states are multiplied with, and the sum's value and gradients, each sequence by itself."""
    prompts, answers = case[:2]
    graph, params = nnx.split(tiny.model())
    targets = [np.random.default_rng(i).normal(size=(len(a), 16)).astype(np.float32) for i, a in enumerate(answers)]

    def total(params):
        return sum(jnp.sum(h * t) for h, t in zip(whole(nnx.merge(graph, params), prompts, answers), targets))

    return targets, jax.jit(jax.value_and_grad(total))(params)


@pytest.mark.parametrize("remat", ["none", "layers"])
def test_as_if_computed_whole(case, apart, remat):
    targets, (want, want_grads) = apart
    graph, params = nnx.split(tiny.model())

    def shared(params):
        hidden = continuations(nnx.merge(graph, params), *case[2:], remat=remat)
        return sum(jnp.sum(hidden[i, : len(t)] * t) for i, t in enumerate(targets))

    value, grads = jax.jit(jax.value_and_grad(shared))(params)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    largest = max(float(jnp.abs(expected).max()) for expected in jax.tree.leaves(want_grads))
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6 * largest)


def test_routes_are_replayed(case):
    prompts, answers, (before, after) = case[0], case[1], case[2:]
    model, rng = tiny.model(), np.random.default_rng(1)
    config = model.config
    shape = (config.num_layers, config.experts_per_token)
    routes = [rng.integers(0, config.num_experts, (*x.tokens.shape, *shape)).astype(np.uint8) for x in (before, after)]
    hidden = continuations(model, before._replace(routes=routes[0]), after._replace(routes=routes[1]))
    joined = np.zeros((len(answers), ROOM + LONGEST, *shape), np.uint8)
    for i, answer in enumerate(answers):
        start = len(prompts[i // TIMES])
        joined[i, :start] = routes[0][i // TIMES, :start]
        joined[i, start : start + len(answer)] = routes[1][i, : len(answer)]
    for i, want in enumerate(whole(model, prompts, answers, jnp.asarray(joined))):
        np.testing.assert_allclose(hidden[i, : len(want)], want, rtol=1e-4, atol=1e-5)
