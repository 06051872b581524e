"""Attempts at problems: what was said, by whom, and under which chance. The policy is played by a script."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax.chat import Tokenizer, encode_chat, encode_prompt
from m1jax.errors import UserError
from m1jax.inference.types import Completion, Request, Sampling, Ticket
from m1jax.rl.environment import SingleTurn
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.rollout import GenerationRecipe, Prompts, Rollout
from m1jax.rl.tasks import Problem
from tests import tiny

TOKENIZER = Tokenizer.tiny()


class Questions:
    name = "questions"

    def problem(self, split, seed, index):
        return Problem(f"{split} {seed} {index}?", "yes")

    def correct(self, problem, answer):
        return answer == problem.answer


class Script:
    """Writes one text after the other, whatever it is asked; a text in capitals never ends."""

    def __init__(self, *texts):
        self.texts, self.calls, self.waiting, self.submitted = texts, [], {}, 0

    def load(self, params, version):
        self.version = version

    def rest(self):
        pass

    rows = 8

    def run(self, requests):
        text = self.texts[len(self.calls)]
        self.calls.append(list(requests))
        return [[self.completion(request, text)] * request.samples for request in requests]

    def submit(self, request):
        ticket = Ticket(self.submitted)
        self.submitted += 1
        self.waiting[ticket] = request
        return ticket

    def step(self):
        waiting, self.waiting = self.waiting, {}
        completions = self.run(list(waiting.values()))
        return [(ticket, one) for ticket, (one,) in zip(waiting, completions)]

    def completion(self, request, text):
        tokens = [*TOKENIZER.encode(text), TOKENIZER.eos_id][: request.sampling.max_new_tokens]
        finish = "stop" if tokens[-1] == TOKENIZER.eos_id else "length"
        logp = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        rest = {"nucleus_logp": logp, "routes": None, "finish": finish, "sample": 0}
        written, version = np.ones(len(tokens), bool), np.full(len(tokens), 7, np.int32)
        return Completion(np.array(tokens, np.int32), logp, written=written, version=version, **rest)


class Twice:
    """Asks once more."""

    def reset(self, problem, rng):
        self.turns = 0
        return [{"role": "user", "content": problem.prompt}]

    def step(self, text):
        self.turns += 1
        return ([{"role": "user", "content": "sure?"}], False) if self.turns == 1 else ([], True)


def recipe(**changes):
    return GenerationRecipe(**(dict(prompts=2, samples=3, max_prompt_tokens=80, max_new_tokens=100) | changes))


def test_one_turn():
    script = Script("<think>a</think>yes")
    groups = Rollout(Questions(), TOKENIZER, script, recipe(chat=False))("train", 5, 4)
    assert [group.problem.prompt for group in groups] == ["train 5 4?", "train 5 5?"]
    (call,) = script.calls
    assert [TOKENIZER.decode(request.tokens) for request in call] == ["train 5 4?", "train 5 5?"]
    assert [request.samples for request in call] == [3, 3]
    for group in groups:
        assert len(group.episodes) == 3
        for one in group.episodes:
            assert TOKENIZER.decode(one.prompt) == group.problem.prompt
            assert one.turns == ("<think>a</think>yes",)
            assert TOKENIZER.decode(one.tokens) == "<think>a</think>yes<end_of_sentence>"
            assert one.written.all()
            assert (one.version == 7).all()
            assert one.finish == "stop"
            assert one.length == len(one.logp) == len(one.tokens)


def test_cut_at_the_limit():
    (group, _) = Rollout(Questions(), TOKENIZER, Script("yes"), recipe(max_new_tokens=2))("train", 0, 0)
    assert {(one.finish, one.ended) for one in group.episodes} == {("length", "cut")}
    assert group.episodes[0].turns == ("ye",)


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_go_through_the_chat_format(chat):
    script = Script("yes")
    Rollout(Questions(), TOKENIZER, script, recipe(chat=chat))("train", 0, 0)
    message = {"role": "user", "content": "train 0 0?"}
    want = encode_prompt(TOKENIZER, [message]) if chat else TOKENIZER.encode("train 0 0?")
    assert script.calls[0][0].tokens.tolist() == list(want)


def test_two_turns():
    """What the environment says stands between the turns, and is nobody's to learn."""
    script = Script("one", "two")
    (group, _) = Rollout(Questions(), TOKENIZER, script, recipe(), Twice)("train", 0, 0)
    one = group.episodes[0]
    assert one.turns == ("one", "two")
    messages = [
        {"role": "user", "content": "train 0 0?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "two"},
    ]
    ids, written = encode_chat(TOKENIZER, messages)
    whole = np.concatenate([one.prompt, one.tokens])
    np.testing.assert_array_equal(whole, ids[: len(whole)])
    np.testing.assert_array_equal(one.written, written[len(one.prompt) : len(whole)])
    assert one.length == 8
    np.testing.assert_array_equal(one.logp[one.written], [-1, -2, -3, -4] * 2)
    assert (one.logp[~one.written] == 0).all()
    assert set(one.version[~one.written]) == {-1}
    # The second turn: each attempt for itself, with a key of its own and what is left of its tokens.
    _, second = script.calls
    assert [request.samples for request in second] == [1] * 6
    assert len({tuple(jax.random.key_data(request.key).tolist()) for request in second}) == 6
    assert second[0].sampling.max_new_tokens == 100 - (len(one.tokens) - 4)


def test_no_room_for_another_turn():
    (group, _) = Rollout(Questions(), TOKENIZER, Script("one"), recipe(max_new_tokens=20), Twice)("train", 0, 0)
    one = group.episodes[0]
    assert (one.turns, one.finish, one.ended, one.length) == (("one",), "length", "overflow", 4)


def test_prompts_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="'train 0 0\\?' has 10 tokens; max_prompt_tokens is 9"):
        Rollout(Questions(), TOKENIZER, Script("yes"), recipe(chat=False, max_prompt_tokens=9))("train", 0, 0)


def test_an_environment_that_speaks_by_chance():
    """Then the attempts of a group share nothing but the problem; the chance is the attempt's own."""

    class Dice(SingleTurn):
        def reset(self, problem, rng):
            return [{"role": "user", "content": str(rng.integers(10**6))}]

    script = Script("yes")
    rollout = Rollout(Questions(), TOKENIZER, script, recipe(), Dice)
    first = [e.prompt.tolist() for group in rollout("train", 0, 0) for e in group.episodes]
    assert len({tuple(prompt) for prompt in first}) == 6
    script.calls.clear()
    second = [e.prompt.tolist() for group in rollout("train", 0, 1) for e in group.episodes]
    assert second[:3] == first[3:]


@pytest.fixture(scope="module")
def generator():
    graph, params = nnx.split(tiny.model())
    made = EngineGenerator(graph, prompts=2, samples=2, prompt_tokens=16, new_tokens=8)
    made.load(params, 3)
    return made


def request(text, number, samples=2, limit=6):
    key = jax.random.key(number)
    sampling = Sampling(top_p=1.0, max_new_tokens=limit, end_ids=(TOKENIZER.eos_id, 101))
    return Request(tokens=np.array(TOKENIZER.encode(text), np.int32), key=key, sampling=sampling, samples=samples)


def test_completions_depend_on_their_request_alone(generator):
    first = generator.run([request("abc", 0), request("de", 1)])
    second = generator.run([request("de", 1), request("longer", 2)])
    assert [len(group) for group in first] == [2, 2]
    for a, b in zip(first[1], second[0]):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logp, b.logp, rtol=1e-5)
        assert a.finish == b.finish
        assert (a.version == 3).all()
    assert first[0][0].tokens.tolist() != first[0][1].tokens.tolist()


def test_log_probabilities_are_the_models(generator):
    model = tiny.model()
    one = generator.run([request("abc", 0), request("de", 1)])[0][0]
    ids = jnp.array([[*TOKENIZER.encode("abc"), *one.tokens.tolist()]])
    logp, _ = model.log_probs(model.forward(ids[:, :-1]).hidden, ids[:, 1:])
    np.testing.assert_allclose(one.logp, logp[0, -len(one.tokens) :], atol=1e-5)


def test_every_request_has_its_own_limit(generator):
    long, short = generator.run([request("abc", 0, limit=6), request("abc", 0, limit=2)])
    for a, b in zip(long, short):
        np.testing.assert_array_equal(b.tokens, a.tokens[:2])
        assert b.finish == ("stop" if len(a.tokens) <= 2 and a.finish == "stop" else "length")


def test_texts_that_are_no_chat_stay_texts():
    plain, chat = Prompts(TOKENIZER, False), Prompts(TOKENIZER, True)
    message = [{"role": "user", "content": "a<think>"}]
    assert TOKENIZER.decode(plain.first(message)) == "a<think>"
    assert TOKENIZER.token_id("<think>") not in chat.first(message)
