"""One cache, never wrong: every way of feeding tokens equals the plain forward pass."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1jax import UserError
from tests.model.conftest import random_tokens, small_model

TOLERANCE = 1e-4
MODELS = {pattern: small_model(pattern) for pattern in ("LSLS", "SLL")}
MODELS["6 heads"] = small_model("LS", num_heads=6, num_kv_heads=3)
LENGTH = 24


# Every shape is a program to compile, so the properties draw from few shapes and many arrangements.
@settings(max_examples=15)
@given(name=st.sampled_from(["LSLS", "SLL"]), pieces=st.permutations([1, 1, 5, 17]), seed=st.integers(0, 99))
def test_prefill_in_any_split_equals_the_whole(name, pieces, seed):
    model, tokens = MODELS[name], random_tokens(seed, 3, LENGTH)
    expected = model(tokens)
    cache, parts, start = model.init_cache(3, LENGTH), [], 0
    for piece in pieces:
        logits, cache = model(tokens[:, start : start + piece], cache)
        parts.append(logits)
        start += piece
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=TOLERANCE)
    assert cache.lengths.tolist() == [LENGTH] * 3


@pytest.mark.parametrize("name", sorted(MODELS))
def test_token_by_token_equals_the_whole(name):
    model, tokens = MODELS[name], random_tokens(1, 3, LENGTH)
    expected = model(tokens)
    step, cache = jax.jit(lambda token, cache: model(token, cache)), model.init_cache(3, LENGTH + 5)
    for t in range(LENGTH):
        logits, cache = step(tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=TOLERANCE)


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(MODELS)),
    chunks=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_ragged_rows_equal_each_row_alone(name, chunks, seed):
    """Each chunk brings a different number of tokens, also none, to each row; the rest of the chunk is padding."""
    model, tokens = MODELS[name], random_tokens(seed, 3, LENGTH)
    expected = model(tokens)
    cache, seen = model.init_cache(3, LENGTH + 6), np.zeros(3, int)
    for lengths in chunks:
        chunk = np.array(random_tokens(seed + 1, 3, 6))  # padding holds arbitrary tokens
        for row, n in enumerate(lengths):
            chunk[row, :n] = tokens[row, seen[row] : seen[row] + n]
        logits, cache = model(jnp.array(chunk), cache, lengths=jnp.array(lengths))
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(logits[row, :n], expected[row, seen[row] : seen[row] + n], atol=TOLERANCE)
        seen += lengths
        assert cache.lengths.tolist() == seen.tolist()
    logits, _ = model(tokens[jnp.arange(3), seen][:, None], cache)  # and decoding goes on from there
    np.testing.assert_allclose(logits[:, 0], expected[jnp.arange(3), seen], atol=TOLERANCE)


def test_an_idle_row_of_a_decode_step_stays_as_it_is():
    model, tokens = MODELS["LSLS"], random_tokens(2, 2, 9)
    expected = model(tokens)
    _, cache = model(tokens[:, :7], model.init_cache(2, 16))
    _, cache = model(tokens[:, 7:8], cache, lengths=jnp.array([1, 0]))
    logits, cache = model(jnp.stack([tokens[0, 8:9], tokens[1, 7:8]]), cache)
    np.testing.assert_allclose(logits[0, 0], expected[0, 8], atol=TOLERANCE)
    np.testing.assert_allclose(logits[1, 0], expected[1, 7], atol=TOLERANCE)
    assert cache.lengths.tolist() == [9, 8]


def test_last_only_returns_each_rows_last_real_token():
    model, tokens = MODELS["LSLS"], random_tokens(3, 2, 10)
    expected, lengths = model(tokens), jnp.array([10, 4])
    logits, _ = model(tokens, model.init_cache(2, 10), lengths=lengths, last_only=True)
    np.testing.assert_allclose(logits, expected[jnp.arange(2), lengths - 1], atol=TOLERANCE)


def test_on_a_gpu_pages_are_whole_pieces_of_its_kernels(monkeypatch):
    monkeypatch.setattr("m1jax.model.cache.target_platform", lambda: "gpu")
    assert MODELS["LSLS"].init_cache(1, 70).max_length == 128


def test_a_full_cache_is_refused_before_anything_is_computed():
    model = MODELS["LSLS"]
    _, cache = model(random_tokens(0, 1, 6), model.init_cache(1, 8))
    with pytest.raises(UserError, match="9 tokens in a cache with room for 8"):
        model(random_tokens(0, 1, 3), cache)
    with pytest.raises(UserError, match="max_position_embeddings = 4096"):
        model.init_cache(1, 5000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": jnp.zeros((1, 0), jnp.int32)}, "empty"),
        ({"tokens": jnp.full((1, 3), 64)}, "not all in the vocabulary 0..63"),
        ({"tokens": jnp.full((1, 3), -1)}, "not all in the vocabulary"),
        ({"tokens": jnp.zeros((1, 3), jnp.int32), "lengths": jnp.array([4])}, "lengths must lie"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        MODELS["LSLS"](**arguments)


def test_segments_and_a_cache_do_not_mix():
    model, tokens = MODELS["LSLS"], random_tokens(0, 1, 3)
    with pytest.raises(UserError, match="neither a cache"):
        model(tokens, model.init_cache(1, 4), segment_ids=jnp.zeros_like(tokens))
    with pytest.raises(UserError, match="cache is for 2 rows"):
        model(tokens, model.init_cache(2, 4))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"tokens": jnp.zeros((1, 3))}, "tokens"),
        ({"tokens": jnp.zeros(3, jnp.int32)}, "tokens"),
        ({"tokens": jnp.zeros((1, 3), jnp.int32), "lengths": jnp.array([1, 1])}, "lengths"),
        ({"tokens": jnp.zeros((1, 3), jnp.int32), "segment_ids": jnp.zeros((1, 4), jnp.int32)}, "segment_ids"),
    ],
)
def test_arrays_of_another_shape_are_refused(arguments, name):
    with pytest.raises((UserError, jaxtyping.TypeCheckError), match=name):  # under test, signatures are checked first
        MODELS["LSLS"](**arguments)


def test_one_row_decodes_without_copying_its_pages():
    model = small_model("LS")
    cache = model.init_cache(batch=1, max_length=4096)
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache), donate_argnums=2)
    program = step.lower(model, jnp.zeros((1, 1), jnp.int32), cache).compile().as_text()
    shape = ",".join(map(str, cache.runs[1].keys.shape))
    assert f"f32[{shape}]" in program
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(.*", program)
