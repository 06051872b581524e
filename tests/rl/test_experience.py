"""Generation batches: rounds, surplus groups, retired problems, and a state that goes on exactly."""

import dataclasses

import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl.experience import Experience, Made
from m1jax.rl.recipe import GenerationRecipe, LossRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.rewards import Verdict
from m1jax.rl.rollout import GIVE_UP, Rollout
from m1jax.rl.tasks import Problem
from m1jax.rl.types import Group
from m1jax.rl.window import WindowRecipe
from tests import tiny
from tests.rl.episodes import episode

RECIPE = RLRecipe(
    generation=GenerationRecipe(
        prompts=2, samples=2, rounds=3, keep_surplus=True, max_prompt_tokens=2, max_new_tokens=8, chat=False
    ),
    update=UpdateRecipe(row_length=10),
)


class Policy:
    """Is asked, and notes by which version; its answer number n is the problem's number and n."""

    def __init__(self, prompts=2):
        self.prompts, self.asked, self.windows = prompts, [], []

    def load(self, params, version):
        self.version = version

    def rest(self):
        pass

    def __call__(self, split, seed, first, *, window, skip=lambda problem: False, draw=None):
        groups, number = [], first
        while len(groups) < self.prompts:
            problem = Problem(str(number % 12), "")
            if not skip(problem):
                answers = tuple(
                    dataclasses.replace(episode(f"{number} {n}", tokens=range(4)), version=np.full(4, self.version))
                    for n in range(2)
                )
                groups.append(Group(problem, answers, number))
                self.asked.append((number, self.version))
            number += 1
        self.windows.append(window)
        return groups


def experience(policy, recipe=RECIPE, teaches=lambda number: True, right=lambda number: False):
    def judge(problem, episode):
        number, n = map(int, episode.turns[0].split())
        correct = right(number)
        return Verdict(float(n if teaches(number) else 0), 0.0, correct)

    return Experience(policy, policy, judge, recipe, 0, tiny.CONFIG)


def numbers(made):
    return [group.group.number for group in made.scored]


def test_surplus_waits_for_the_next_batch():
    policy = Policy()
    source = experience(policy, teaches=lambda number: number != 1)
    first, second, third = (source.batch(None, version) for version in range(3))
    # Problem 1 teaches nothing: a second round, of which 3 is too many for this batch.
    assert numbers(first) == [0, 1, 2, 3]
    assert (first.figures["asked"], first.figures["kept"], first.figures["waited"]) == (4, 3, 0)
    assert numbers(second) == [3, 4, 5]
    assert (second.figures["asked"], second.figures["kept"], second.figures["waited"]) == (2, 3, 1)
    assert numbers(third) == [5, 6, 7]
    assert policy.asked == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 2), (7, 2)]
    assert second.scored[0].group.episodes[0].version[0] == 0  # and says by whom it was written


def test_about_a_batchs_baseline_nothing_is_refilled():
    source = experience(
        Policy(), dataclasses.replace(RECIPE, loss=LossRecipe(convention="ppo")), teaches=lambda number: number != 1
    )
    assert [numbers(source.batch(None, version)) for version in range(2)] == [[0, 1], [2, 3]]


def test_mastered_problems_retire():
    generation = dataclasses.replace(RECIPE.generation, retire_above=0.9)
    source = experience(Policy(), dataclasses.replace(RECIPE, generation=generation), right=lambda n: n % 3 == 0)
    asked = [number for version in range(10) for number in numbers(source.batch(None, version))]
    asked = list(dict.fromkeys(asked))
    assert [n for n in asked if n < 12] == list(range(12))
    assert {n % 12 for n in asked if n >= 12} == {n for n in range(12) if n % 3}


@pytest.mark.parametrize("after", [1, 2, 3])
def test_it_goes_on_from_its_state(after):
    recipe = dataclasses.replace(
        RECIPE,
        generation=dataclasses.replace(RECIPE.generation, retire_above=0.9),
        window=WindowRecipe(windows=(4, 8), window_batches=2, window_tolerance=1.0, window_nearness=0.5),
    )

    def made(source, versions):
        return [source.batch(None, version) for version in versions]

    rules = {"teaches": lambda n: n % 4 != 1, "right": lambda n: n % 5 == 0}
    want = made(experience(Policy(), recipe, **rules), range(5))
    assert {one.figures["window"] for one in want} == {4, 8}
    assert any(one.said for one in want)
    source = experience(Policy(), recipe, **rules)
    before = made(source, range(after))
    rest, arrays = source.state()
    source = experience(Policy(), recipe, **rules)
    source.restore(rest, arrays)
    for got, expected in zip(before + made(source, range(after, 5)), want, strict=True):
        assert numbers(got) == numbers(expected)
        assert (got.figures, got.said, got.work) == (expected.figures, expected.said, expected.work)
        again = Made.from_arrays(*got.to_arrays())
        assert (again.figures, again.said, again.work, numbers(again)) == (
            got.figures,
            got.said,
            got.work,
            numbers(got),
        )


def test_when_nothing_is_left():
    class One:
        name = "one"

        def problem(self, split, seed, index):
            return Problem("x", "y")

    rollout = Rollout(One(), None, None, RECIPE.generation)
    with pytest.raises(UserError, match=rf"mastered all problems \({GIVE_UP} in a row"):
        rollout("train", 0, 0, skip=lambda problem: True)
