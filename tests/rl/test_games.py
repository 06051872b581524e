"""Games of other packages, played through the same rollouts as everything else."""

import importlib.util
import re

import pytest

from m1jax.errors import UserError
from m1jax.rl.rewards import RewardRecipe, RuleJudge, score
from m1jax.rl.rollout import Rollout
from m1jax.rl.tasks import get_task
from tests.rl.test_conversations import TOKENIZER, Player, recipe


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason="the extra `games` is missing")


with_gymnasium, with_textarena = needs("gymnasium"), needs("textarena")


def play(name, policy, **changes):
    task = get_task(name)
    sizes = recipe(prompts=4, samples=2, max_new_tokens=4000, **changes)
    groups = Rollout(task, TOKENIZER, Player(policy), sizes)("train", 0, 0)
    return score(groups, RuleJudge(task, 0.1), RewardRecipe(), max_tokens=4000)


@with_gymnasium
def test_cliff_walking():
    """Up, along the cliff and down: thirteen steps, each of which costs one."""

    def policy(text):
        turns = text.count("<end_of_sentence>")
        return f"<think>turn {turns}</think>{0 if turns == 0 else 1 if turns < 12 else 2}"

    for group in play("gymnasium:CliffWalking-v1", policy):
        assert group.raw.tolist() == [-13, -13]
        one = group.group.episodes[0]
        assert (one.ended, len(one.turns)) == ("done", 13)
        assert TOKENIZER.decode(one.prompt).startswith("Actions: 0 to 3\n")


@with_gymnasium
def test_a_move_that_is_none():
    (group, *_) = play("gymnasium:CliffWalking-v1", lambda text: "left!", max_turns=2)
    one = group.group.episodes[0]
    assert TOKENIZER.decode(one.tokens[~one.written]) == "an action is a number from 0 to 3"
    assert (one.ended, group.raw.tolist()) == ("turns", [0, 0])


@with_gymnasium
def test_games_are_chance_of_the_problem():
    """Blackjack without a rendering: the attempts of a group see the same cards, other problems others."""
    groups = play("gymnasium:Blackjack-v1", lambda text: "0")
    prompts = [{TOKENIZER.decode(one.prompt) for one in group.group.episodes} for group in groups]
    assert all(len(found) == 1 for found in prompts)
    assert len(set.union(*prompts)) > 1


@with_textarena
def test_guess_the_number():
    def halving(text):
        low, high = 1, 20
        for guess, said in re.findall(r"\[(\d+)\]<end_of_sentence>[^<]*?(higher|lower)", text):
            low, high = (low, int(guess) - 1) if said == "lower" else (int(guess) + 1, high)
        return f"<think></think>[{(low + high) // 2}]"

    for group in play("textarena:GuessTheNumber-v0", halving):
        assert group.raw.tolist() == [1, 1]
        one = group.group.episodes[0]
        assert TOKENIZER.decode(one.tokens).count("You are playing Guess The Number") == 0  # said once, in the prompt


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("gymnasium:Nothing-v1", "task gymnasium:Nothing-v1: ", marks=with_gymnasium),
        pytest.param("gymnasium:Pendulum-v1", "expected Discrete ones", marks=with_gymnasium),
        pytest.param("textarena:Nothing-v0", "TextArena has no such game", marks=with_textarena),
    ],
)
def test_games_that_are_not_there(name, says):
    with pytest.raises(UserError, match=says):
        get_task(name)
