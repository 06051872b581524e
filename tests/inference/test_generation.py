"""Generation against the plain forward pass, and against itself in other company."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m1jax
from m1jax import MiniMaxM1, ModelConfig, UserError
from m1jax.chat import Tokenizer
from m1jax.inference import generate

PROMPTS = [[5, 6, 7], [250, 1, 2, 3, 4, 5, 6, 7, 8], [9], [17, 18, 19, 20]]


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=263,
        hidden_size=16,
        intermediate_size=16,
        layer_types=("lightning", "softmax"),
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rotary_dim=4,
        num_experts=3,
        experts_per_token=2,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    return MiniMaxM1(config, rngs=nnx.Rngs(0))


def teacher_forced(model, results, temperature=1.0):
    """Log-probabilities [len, vocab] at every generated token, of all results in one causal forward pass."""
    rows = [PROMPTS[i // (len(results) // len(PROMPTS))] + result.tokens for i, result in enumerate(results)]
    logits = model(jnp.array([row + [0] * (24 - len(row)) for row in rows])) / temperature
    log_probs = np.asarray(logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True)))
    return [
        log_probs[i, len(row) - len(result.tokens) - 1 : len(row) - 1]
        for i, (row, result) in enumerate(zip(rows, results))
    ]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_are_the_forward_pass(model, temperature):
    results = generate(model, PROMPTS, max_new_tokens=12, temperature=temperature, top_p=1.0, samples_per_prompt=2)
    assert len(results) == 8
    for result, expected in zip(results, teacher_forced(model, results, temperature)):
        assert len(result.tokens) == 12
        assert result.finish_reason == "length"
        chosen = np.take_along_axis(expected, np.array(result.tokens)[:, None], -1)[:, 0]
        np.testing.assert_allclose(result.log_probs, chosen, atol=1e-4)
    assert results[0].tokens != results[1].tokens


def test_greedy_takes_the_most_probable_token(model):
    results = generate(model, PROMPTS, max_new_tokens=12, temperature=0.0)
    for result, expected in zip(results, teacher_forced(model, results)):
        assert result.tokens == np.argmax(expected, -1).tolist()


def test_a_request_does_not_depend_on_its_neighbours(model):
    together = generate(model, PROMPTS, max_new_tokens=12, seed=[1, 2, 3, 4], samples_per_prompt=2)
    alone = generate(model, PROMPTS[2:3], max_new_tokens=12, seed=[3], samples_per_prompt=2)
    assert [r.tokens for r in together[4:6]] == [r.tokens for r in alone]
    others = generate(model, [[1], [2], PROMPTS[2]], max_new_tokens=12, seed=[7, 8, 3])
    assert others[2].tokens == alone[0].tokens


def test_rows_end_at_an_end_token(model):
    free = generate(model, PROMPTS, max_new_tokens=12, seed=0)
    ends = sorted({result.tokens[4] for result in free})
    for before, result in zip(free, generate(model, PROMPTS, max_new_tokens=12, seed=0, end_ids=ends)):
        place = next(i for i, token in enumerate(before.tokens) if token in ends)
        assert result.tokens == before.tokens[: place + 1]
        assert result.finish_reason == "stop"
        assert len(result.log_probs) == place + 1


def test_texts(model):
    tokenizer = Tokenizer.tiny()
    (result,) = generate(model, ["a=1"], max_new_tokens=5, tokenizer=tokenizer, temperature=0.0)
    (same,) = generate(model, [tokenizer.encode("a=1")], max_new_tokens=5, temperature=0.0)
    assert same.text is None
    assert (result.tokens, result.text) == (same.tokens, tokenizer.decode(same.tokens))
    assert m1jax.generate(model, [], tokenizer=tokenizer) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 263]], {}, "prompt 0 holds token 263"),
        (["a"], {}, "give a tokenizer"),
        ([[1] * 60], {"max_new_tokens": 5}, "exceed the model's 64 positions"),
        ([[1]], {"top_p": 0.0}, "top_p = 0.0"),
        ([[1]], {"temperature": -1.0}, "temperature = -1.0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([[1]], {"seed": [1, 2], "max_new_tokens": 5}, "2 seeds for 1 prompts"),
        ([[1]], {"seed": 10**30, "max_new_tokens": 5}, "seed = 10000"),
        ([[1]], {"seed": [-1], "max_new_tokens": 5}, "seed = -1"),
        ("hello", {}, "prompts is one text"),
        (
            ["caf\udce9"],
            {"max_new_tokens": 5, "tokenizer": Tokenizer.tiny()},
            "prompt 0: no valid Unicode at character 4",
        ),
    ],
)
def test_bad_input(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts, **options)
