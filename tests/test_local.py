"""An agent on a model in this process."""

import pytest

from m1jax import Agent
from m1jax.agent import ContextOverflow
from m1jax.chat import Tokenizer
from m1jax.local import LocalModel
from tests import tiny

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def make():
    model = tiny.model()
    return lambda **options: LocalModel(model, Tokenizer.tiny(), max_length=400, **options)


def test_the_same_seed_says_the_same(make):
    said = ["".join(make(max_new_tokens=20, seed=seed).respond(USER, [])) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_a_turn_that_is_not_heard_to_its_end(make):
    model = make(max_new_tokens=100)
    pieces = model.respond(USER, [])
    next(pieces)
    pieces.close()
    assert "".join(model.respond(USER, []))


def test_a_conversation_that_is_too_long(make):
    model = make()
    with pytest.raises(ContextOverflow, match=r"exceeds the context of 400 by \d+"):
        list(model.respond([{"role": "user", "content": "x" * 500}], []))
    transcript = Agent(model, max_steps=3).run([{"role": "user", "content": "x" * 500}])
    assert transcript.ended == "overflow"
    assert len("".join(model.respond([{"role": "user", "content": "x" * 250}], []))) < 150
