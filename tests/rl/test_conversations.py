"""Several turns with environments: limits, failures, slow answers, tools; and what the engine computes for them."""

import asyncio
import dataclasses
import json
import logging
import re

import jax
import numpy as np
import pytest
from flax import nnx

from m1jax import agent
from m1jax.chat import Tokenizer, encode_chat
from m1jax.inference.types import Completion, Ticket
from m1jax.rl.environment import SingleTurn, Step, environment_of
from m1jax.rl.environments.tools import ToolUse
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.prepare import example
from m1jax.rl.rewards import RewardRecipe, RuleJudge, score
from m1jax.rl.rollout import GenerationRecipe, Rollout
from m1jax.rl.tasks import Problem, get_task
from m1jax.rl.tasks.shop import calculate, look_up
from tests import tiny

TOKENIZER = Tokenizer.tiny()


class Numbers:
    name = "numbers"

    def problem(self, split, seed, index):
        return Problem(str(index), str(index))

    def correct(self, problem, answer):
        return answer == problem.answer


class Player:
    """A policy that writes whatever a function makes of the text before it."""

    def __init__(self, function, rows=4):
        self.function, self.rows = function, rows
        self.waiting, self.submitted, self.most = {}, 0, 0

    def load(self, params, version):
        pass

    def rest(self):
        pass

    def submit(self, request):
        ticket = Ticket(self.submitted)
        self.submitted += 1
        self.waiting[ticket] = request
        self.most = max(self.most, len(self.waiting))
        return ticket

    def step(self):
        waiting, self.waiting = self.waiting, {}
        return [(ticket, self.completion(request)) for ticket, request in waiting.items()]

    def completion(self, request):
        text = self.function(TOKENIZER.decode(request.tokens))
        tokens = [*TOKENIZER.encode(text), TOKENIZER.eos_id][: request.sampling.max_new_tokens]
        logp, true = -np.ones(len(tokens), np.float32), np.ones(len(tokens), bool)
        finish = "stop" if tokens[-1] == TOKENIZER.eos_id else "length"
        version = np.zeros(len(tokens), np.int32)
        return Completion(np.array(tokens, np.int32), logp, logp, true, version, None, finish, 0)


def recipe(**changes):
    sizes = dict(prompts=3, samples=2, max_prompt_tokens=2000, max_new_tokens=400, chat=False)
    return GenerationRecipe(**(sizes | changes))


def episodes(function, environment, task=None, rows=4, **changes):
    rollout = Rollout(task or Numbers(), TOKENIZER, Player(function, rows), recipe(**changes), environment)
    return [one for group in rollout("train", 0, 0) for one in group.episodes]


class Counting(SingleTurn):
    """Says `.` again and again."""

    def step(self, text):
        return [{"role": "user", "content": "."}], False


def test_turns_are_limited():
    found = episodes(lambda text: "ab", Counting, max_turns=3)
    assert {(one.turns, one.ended, one.finish) for one in found} == {(("ab",) * 3, "turns", "length")}
    assert {TOKENIZER.decode(one.tokens[one.written]) for one in found} == {"ab<end_of_sentence>" * 3}
    assert {TOKENIZER.decode(one.tokens[~one.written]) for one in found} == {".."}


def test_a_turn_is_limited():
    found = episodes(lambda text: "abc" if text.endswith(".") else "a", Counting, max_turn_tokens=3)
    assert {(one.turns, one.ended, one.finish) for one in found} == {(("a", "abc"), "cut", "length")}


def test_an_episode_is_limited():
    found = episodes(lambda text: "abc", Counting, max_new_tokens=12)
    # abc, its end, a dot; again; and then two tokens are left.
    assert {(one.turns, one.ended) for one in found} == {(("abc", "abc", "ab"), "cut")}
    found = episodes(lambda text: "abc", Counting, max_new_tokens=10)
    assert {(one.turns, one.ended, len(one.tokens)) for one in found} == {(("abc", "abc"), "overflow", 9)}


class Paying(SingleTurn):
    def __init__(self):
        self.turns = 0

    def step(self, text):
        self.turns += 1
        return Step([{"role": "user", "content": "+"}], self.turns == 3, 0.5 if text == "good" else None)


def test_environments_may_reward():
    judge = RuleJudge(Numbers(), 0.1)
    one = episodes(lambda text: "good", Paying)[0]
    assert (one.reward, one.ended) == (1.5, "done")
    assert judge(Problem("", ""), one) == (1.5, 0, True)
    assert episodes(lambda text: "bad", Paying)[0].reward is None


class Fragile(SingleTurn):
    def reset(self, problem, rng):
        if problem.prompt == "1":
            raise OSError("no such game")
        return super().reset(problem, rng)

    def step(self, text):
        if text == "2":
            raise ZeroDivisionError("two")
        return None if text == "3" else ([], True)


def test_what_breaks_down_costs_its_attempt(caplog):
    turn = iter(["0", "3", "2", "2"])
    groups = Rollout(Numbers(), TOKENIZER, Player(lambda text: next(turn)), recipe(), Fragile)("train", 0, 0)
    assert [[one.ended for one in group.episodes] for group in groups] == [
        ["done", "failed"],
        ["failed", "failed"],
        ["failed", "failed"],
    ]
    said = [one.failure for group in groups for one in group.episodes]
    assert re.search(r"environment Fragile: .*test_conversations\.py, line \d+: OSError: no such game, at pr", said[2])
    assert "ZeroDivisionError: two, at problem '2' of numbers" in said[4]
    assert "TypeError" in said[1]
    with caplog.at_level(logging.WARNING):
        scored = score(groups, RuleJudge(Numbers(), 0.1), RewardRecipe(), max_tokens=9)
    assert [len(group.raw) for group in scored] == [1, 0, 0]
    assert "5 of 6 responses are left out: environment Fragile" in caplog.text


class Slow(SingleTurn):
    """Problem 0 is answered when problem 2 has been."""

    last: asyncio.Event

    async def step(self, text):
        if text == "0":
            await self.last.wait()
        if text == "2":
            self.last.set()
        return [], True


def test_slow_ones_do_not_hold_up_the_others():
    """With a single row, too: who waits has left it to the next."""
    Slow.last = asyncio.Event()
    found = episodes(lambda text: text, Slow, rows=1)
    assert [(one.turns, one.ended) for one in found] == [((str(n),), "done") for n in (0, 0, 1, 1, 2, 2)]


def test_rows_are_not_exceeded():
    player = Player(lambda text: "a", rows=4)
    Rollout(Numbers(), TOKENIZER, player, recipe(max_turns=2), Counting)("train", 0, 0)
    assert (player.most, player.submitted) == (4, 12)


class Never(SingleTurn):
    async def step(self, text):
        if text == "1":
            await asyncio.Event().wait()
        raise ValueError("later")


def test_slow_ones_may_fail_and_take_too_long():
    found = episodes(lambda text: text, Never, answer_seconds=0.05)
    assert {one.ended for one in found} == {"failed"}
    assert "ValueError: later" in found[0].failure
    assert "TimeoutError: no answer within 0.05 seconds, at problem '1'" in found[2].failure


def call(name, **arguments):
    return f"<tool_calls>{json.dumps({'name': name, 'arguments': arguments})}</tool_calls>"


def shopper(text):
    """Solves a problem of the shop, from what it has read."""
    count, item = re.findall(r"(\d+)\*([a-z]{3})=", text)[-1]
    after = text.rpartition(f"{count}*{item}=")[2]
    results = re.findall(r"(?<=[a-z>\n: ])(\d+)(?=<|\n|$)", after.replace("<end_of_sentence>", ">\n"))
    price = str(look_up(item))
    if "calculate" in after:
        return f"<think></think>{int(count) * int(price)}"
    assert ("look_up" in after) == (price in results)
    return call("calculate", expression=f"{count}*{price}") if results else call("look_up", item=item)


@pytest.mark.parametrize("chat", [True, False])
def test_tools(chat):
    shop = get_task("shop")
    rollout = Rollout(shop, TOKENIZER, Player(shopper), recipe(chat=chat, max_new_tokens=600), environment_of(shop))
    groups = rollout("train", 0, 0)
    for group in score(groups, RuleJudge(shop, 0.1), RewardRecipe(), max_tokens=600):
        assert group.raw.tolist() == [1, 1]
    one, problem = groups[0].episodes[0], groups[0].problem
    count, item = problem.prompt[:-1].split("*")
    assert one.turns == (
        call("look_up", item=item),
        call("calculate", expression=f"{count}*{look_up(item)}"),
        f"<think></think>{problem.answer}",
    )
    assert TOKENIZER.decode(one.tokens[one.written]) == "".join(f"{turn}<end_of_sentence>" for turn in one.turns)
    heard = TOKENIZER.decode(one.tokens[~one.written])
    assert str(look_up(item)) in heard
    assert problem.answer in heard
    row = example(one, 1.0, 1.0)
    np.testing.assert_array_equal(row.targets[row.mask], one.tokens[one.written])
    if chat:  # as the chat format has the whole conversation, schemas and all
        tools = [tool.schema for tool in agent.Toolbox([look_up, calculate]).tools]
        results = [str(look_up(item)), str(int(count) * look_up(item))]
        said = [{"role": "user", "content": problem.prompt}]
        for turn, name, result in zip(one.turns, ("look_up", "calculate", ""), [*results, ""]):
            said.append({"role": "assistant", "content": turn})
            said += [{"role": "tool", "content": [{"type": "text", "name": name, "text": result}]}] if name else []
        ids, written = encode_chat(TOKENIZER, said, tools)
        whole = np.concatenate([one.prompt, one.tokens])
        np.testing.assert_array_equal(whole, ids[: len(whole)])
        np.testing.assert_array_equal(one.written, written[len(one.prompt) : len(whole)])


def test_calls_that_are_wrong_are_answered():
    box = agent.Toolbox([look_up, calculate])
    told = ToolUse(box).step(call("look_up", item="x")).messages[0]["content"][0]["text"]
    assert told == "Error: ValueError: there is no item 'x'"
    assert ToolUse(box).step("<think></think>4") == ([], True, None)
    for expression in ("__import__('os')", "2**9", "'a'*9", "1+" * 60, "(", "x"):
        assert "Error" in ToolUse(box).step(call("calculate", expression=expression)).messages[0]["content"][0]["text"]
    assert calculate("-(2+3)*4/8-1") == -3.5


def test_tools_that_are_coroutines():
    async def ask(question: str) -> str:
        await asyncio.sleep(0)
        return question.upper()

    def policy(text):
        return "<think></think>done" if "HELLO" in text else call("ask", question="hello")

    box = agent.Toolbox([ask])
    found = episodes(policy, lambda: ToolUse(box))
    assert {one.turns for one in found} == {(call("ask", question="hello"), "<think></think>done")}


def test_guessing():
    def halving(text):
        low, high = 0, 999
        for guess, said in re.findall(r"(\d+)<end_of_sentence>([<>])", text):
            low, high = (low, int(guess) - 1) if said == "<" else (int(guess) + 1, high)
        return str((low + high) // 2)

    game = get_task("guess")
    found = episodes(halving, None, game, prompts=20)
    assert {one.reward for one in found} == {1.0}
    assert {TOKENIZER.decode(one.prompt) for one in found} == {"0-999:"}
    blind = episodes(lambda text: "<think>x</think>none", None, game)
    assert {(one.reward, len(one.turns), TOKENIZER.decode(one.tokens[~one.written])) for one in blind} == {
        (0.0, 10, "?" * 9)
    }


def test_a_mixture_of_environments():
    found = episodes(lambda text: "<think></think>7", None, get_task("sums+guess"), prompts=4)
    assert [len(one.turns) == 1 for one in found] == [True, True, False, False] * 2
    assert [one.reward is None for one in found] == [True, True, False, False] * 2


class Ending(EngineGenerator):
    """So that a model which knows nothing comes to an end."""

    def submit(self, request):
        ends = (TOKENIZER.eos_id, *range(ord("a"), ord("h")))
        return super().submit(
            dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, end_ids=ends))
        )


class Thrice(SingleTurn):
    def __init__(self):
        self.turns = 0

    def step(self, text):
        self.turns += 1
        return [{"role": "user", "content": "and then? " * self.turns}], self.turns == 3


def test_a_turn_prefills_only_what_is_new():
    """By the engine's own counters, for prompts with nothing in common; log-probabilities are those of the whole."""
    model = tiny.model()
    graph, params = nnx.split(model)
    generator = Ending(graph, prompts=2, samples=4, prompt_tokens=32, new_tokens=256)
    generator.load(params, 3)
    sizes = recipe(prompts=2, samples=4, max_prompt_tokens=32, max_new_tokens=256)
    groups = Rollout(Numbers(), TOKENIZER, generator, sizes, Thrice)(
        "train", 0, 99_999
    )  # prompts with nothing in common
    found = [one for group in groups for one in group.episodes]
    assert sum(len(one.turns) == 3 for one in found) > 4
    heard = sum(int((~one.written).sum()) for one in found)
    prompts = sum(len(group.episodes[0].prompt) - 1 for group in groups)
    assert generator.counts.prefilled == prompts + heard
    one = max(found, key=lambda one: len(one.turns))
    ids = np.concatenate([one.prompt, one.tokens])[None]
    logp, _ = model.log_probs(model.forward(ids[:, :-1]).hidden, jax.numpy.asarray(ids[:, 1:]))
    logp = np.asarray(logp)[0, len(one.prompt) - 1 :]
    np.testing.assert_allclose(one.logp[one.written], logp[one.written], atol=1e-5)
    assert set(one.version[one.written]) == {3}
