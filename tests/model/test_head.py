"""The head on matrix units, whose arithmetic a CPU can do too: against float64, in chunks, and on a mesh."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.model import head
from m1jax.sharding import make_mesh
from pallas_kernels import target
from pallas_kernels.vocabulary import chunks

ROWS, TIME, WIDTH, WORDS = 2, 24, 64, 512
TEMPERATURE = 0.7


# Relative error of gradients. On a TPU probabilities, weights and results are each rounded to bfloat16.
TOLERANCES = {"gpu": 3e-3, "tpu": 4e-3}


@pytest.fixture(params=["gpu", "gpu, scores kept", "tpu"])
def on_matrix_units(request, monkeypatch):
    monkeypatch.setattr(target, "target_platform", lambda: request.param[:3])
    if request.param == "gpu":
        monkeypatch.setattr(head, "KEPT_SCORES", 0)
    monkeypatch.setattr(target, "device_kind", lambda: "an older one")
    jax.clear_caches()  # jit does not see which platform it is for


def problem(spread: float):
    """hidden, lm_head, targets for scores of that standard deviation, and gradients of log-probability and entropy.

    As in training, the gradients are small and those of many tokens zero.
    """
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((ROWS, TIME, WIDTH)), jnp.bfloat16)
    lm_head = jnp.asarray(random.standard_normal((WORDS, WIDTH)) * spread * TEMPERATURE / WIDTH**0.5, jnp.float32)
    targets = jnp.asarray(random.integers(0, WORDS, (ROWS, TIME)), jnp.int32)
    gradients = 1e-7 * random.standard_normal((2, ROWS, TIME)) * 10.0 ** random.integers(-2, 3, (2, ROWS, TIME))
    gradients[:, :, ::3] = 0.0
    return hidden, lm_head, targets, tuple(jnp.asarray(x, jnp.float32) for x in gradients)


def float64(hidden, lm_head, targets, gradients):
    """(log-probability, entropy, d hidden, d lm_head) written out."""
    hidden, lm_head, g, e = (np.asarray(x, np.float64) for x in (hidden, lm_head, *gradients))
    scores = hidden @ lm_head.T / TEMPERATURE
    top = scores.max(-1, keepdims=True)
    log_p = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    chosen = np.eye(WORDS)[np.asarray(targets)]
    d_scores = chosen * g[..., None] - np.exp(log_p) * (g[..., None] + e[..., None] * (log_p + entropy[..., None]))
    d_scores /= TEMPERATURE
    d_lm_head = np.einsum("btv,bti->vi", d_scores, hidden)
    return (log_p * chosen).sum(-1), entropy, d_scores @ lm_head, d_lm_head


@jax.jit
def ours(hidden, lm_head, targets, gradients):
    results, transposed = jax.vjp(lambda h, w: head.log_probs(h, w, targets, TEMPERATURE), hidden, lm_head)
    return *results, *transposed(gradients)


def check(results, truths):
    for result, truth in zip(results[:2], truths[:2], strict=True):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(result, np.float64), truth, rtol=0, atol=1e-5)
    for result, truth in zip(results[2:], truths[2:], strict=True):
        error = np.asarray(result, np.float64) - truth
        assert np.linalg.norm(error) <= TOLERANCES[target.target_platform()] * np.linalg.norm(truth)


@pytest.mark.usefixtures("on_matrix_units")
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_values_are_float32s_and_gradients_bfloat16s(spread):
    arguments = problem(spread)
    check(ours(*arguments), float64(*arguments))


@pytest.mark.usefixtures("on_matrix_units")
def test_logits_are_float32s():
    hidden, lm_head, *_ = problem(1.0)
    result = jax.jit(head.logits)(hidden, lm_head)
    truth = np.asarray(hidden, np.float64) @ np.asarray(lm_head, np.float64).T
    np.testing.assert_allclose(np.asarray(result, np.float64), truth, rtol=0, atol=5e-6)


@pytest.mark.usefixtures("on_matrix_units")
def test_chunks_change_nothing_and_bound_what_is_alive(monkeypatch):
    arguments = problem(1.0)
    whole = ours(*arguments)
    limit = 20 * WORDS
    jax.clear_caches()
    monkeypatch.setattr(chunks, "ELEMENTS", limit)  # 48 tokens in three chunks
    check(ours(*arguments), float64(*arguments))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6), ours(*arguments), whole)
    shapes = re.findall(r"tensor<([\dx]+)x(?:f|bf)\d+>", ours.lower(*arguments).as_text())
    parts = 3 * WORDS * WIDTH
    assert max(math.prod(map(int, shape.split("x"))) for shape in shapes) <= max(parts, limit)


@pytest.mark.usefixtures("on_matrix_units")
@pytest.mark.parametrize("spec", ["fsdp=2,tensor=4", "data=2,tensor=2,sequence=2"])
def test_words_and_tokens_spread_over_a_mesh(spec):
    arguments = problem(1.0)
    with jax.set_mesh(make_mesh(spec)):
        results = ours(*arguments)
    check(results, float64(*arguments))


def test_float32_hidden_states_stay_float32(monkeypatch):
    hidden, lm_head, targets, gradients = problem(1.0)
    jax.clear_caches()
    monkeypatch.setattr(target, "target_platform", lambda: "gpu")
    program = ours.lower(hidden.astype(jnp.float32), lm_head, targets, gradients).as_text()
    assert "f16>" not in program
