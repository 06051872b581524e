"""Whatever a model would like to write, its reply fits the grammar."""

import json
import random

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from m1jax.chat import Tokenizer, as_tools, parse_message
from m1jax.chat.tokens import BOS, EOS
from m1jax.errors import UserError
from m1jax.inference.thinking import thinking_budget
from m1jax.serve.grammar import Grammars


def letters() -> Tokenizer:
    """One whose tags are no tokens, and that has longer tokens, too."""
    model = json.loads(Tokenizer.tiny().to_json())["model"]
    merges = [("<", "t"), ("t", "h"), ('"', "}"), ("}", "}"), ("{", '"'), ("th", "i"), ('"', ",")]
    vocab = {**model["vocab"], **{first + second: 256 + i for i, (first, second) in enumerate(merges)}}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    return Tokenizer(backend)


TOKENIZERS = {"tags": Tokenizer.tiny(), "letters": letters()}
GRAMMARS = {name: Grammars(tokenizer, 320) for name, tokenizer in TOKENIZERS.items()}


def written(grammars, constraint, rng, most, eager=(), budget=None):
    """What a model writes that takes the allowed tokens with equal probability, or an eager one where it may."""
    matcher, tokens = constraint.begin(), []
    while len(tokens) < most:
        bits = matcher.allowed(most - len(tokens))
        allowed = [i for i in range(320) if bits[i // 32] >> np.uint32(i % 32) & 1]
        token = next((t for t in eager if t in allowed and t not in tokens), None) or rng.choice(allowed)
        tokens.append(token)
        matcher.take([token])
        if budget and len(tokens) == budget.tokens + 1 and budget.close[1] not in tokens:
            tokens += budget.close
            matcher.take(budget.close)
        if token == grammars.tokenizer.eos_id:
            return grammars.tokenizer.decode(tokens[:-1])
    raise AssertionError(f"cut: {grammars.tokenizer.decode(tokens)}")


SCHEMAS = [
    {"type": "object"},
    {"type": "array", "items": {"type": "number"}},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["a", 'b"c']},
            "points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1},
        },
        "required": ["name", "kind", "points"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/point"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
    {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "string", "pattern": "^[0-9]{3}$"}]},
]


@pytest.mark.parametrize("name", GRAMMARS)
@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(range(len(SCHEMAS))), st.integers(200, 400), st.booleans())
def test_json(name, seed, schema, most, thinks):
    grammars, tokenizer = GRAMMARS[name], TOKENIZERS[name]
    eager = tokenizer.encode("<think>")[:1] if thinks else ()
    text = written(grammars, grammars.json(SCHEMAS[schema]), random.Random(seed), most, eager)
    value = json.loads(text.rpartition("</think>")[2])
    jsonschema.validate(value, SCHEMAS[schema])


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_thought_that_is_closed_from_outside(name):
    """Also in the middle of a letter."""
    grammars, tokenizer = GRAMMARS[name], TOKENIZERS[name]
    budget = thinking_budget(tokenizer, 20)
    if len(budget.open) > 1:
        pytest.skip("the first token tells nothing")
    for seed in range(30):
        text = written(grammars, grammars.json({"type": "object"}), random.Random(seed), 300, budget.open, budget)
        assert text.startswith("<think>")
        assert isinstance(json.loads(text.rpartition("</think>")[2]), dict)


def add(a: int, b: float = 0.5) -> float:
    """Adds."""
    return a + b


def say(text: str, times: list[int] | None = None) -> str:
    """Says \"it\"."""
    return text


@pytest.mark.parametrize("name", GRAMMARS)
@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, None]), st.integers(300, 500))
def test_calls(name, seed, most, length):
    tools = as_tools([add, say])
    text = written(GRAMMARS[name], GRAMMARS[name].calls(tools, most), random.Random(seed), length)
    message = parse_message(text, tools)
    assert message.content.strip() == ""
    assert not message.errors
    assert 1 <= len(message.tool_calls) <= (most or 100)


def test_a_named_tool():
    tools = as_tools([{"name": 'a "b" ü', "parameters": {"type": "dict", "properties": {"x": {"type": "float"}}}}])
    text = written(GRAMMARS["tags"], GRAMMARS["tags"].calls(tools, 1), random.Random(0), 400)
    assert [call.name for call in parse_message(text, tools).tool_calls] == ['a "b" ü']


def test_log_probabilities_are_asked_of_few_tokens():
    """A string is not cut short while there is room."""
    guide = GRAMMARS["tags"].json({"type": "string"}).begin()
    guide.take(list(b'"'))
    for _ in range(100):
        assert guide.allowed(1000).view(np.uint8).sum() > 1000
        guide.take(list(b"a"))


@pytest.mark.parametrize(
    "schema",
    [{"type": "strange"}, {"not": {}}, {"type": "string", "pattern": "("}, {"$ref": "http://example.com/x"}],
)
def test_schemas_that_cannot_be_enforced(schema):
    with pytest.raises(UserError, match="The schema cannot be enforced"):
        GRAMMARS["tags"].json(schema)
