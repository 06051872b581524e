"""Families of reasoning-gym: problems and their scorers, levels, and those that are left out."""

import importlib
import importlib.util

import pytest

from m1jax.errors import UserError
from m1jax.rl.tasks import LEVELS, get_task
from m1jax.rl.tasks.reasoning_gym import EXCLUDED, ReasoningGym

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the extra `tasks` is missing"
)


def test_a_family():
    """Problems and their judge; families are families, so that accuracy is not counted problem by problem."""
    task = get_task("chain_sum")
    train = [task.problem("train", 0, index) for index in range(20)]
    heldout = [task.problem("heldout", 0, index) for index in range(20)]
    assert train[3] == task.problem("train", 0, 3)
    assert {p.family for p in (*train, *heldout)} == {"chain_sum"}
    assert len({p.id for p in (*train, *heldout)}) == 40
    for problem in train:
        assert task.correct(problem, problem.answer)
        assert not task.correct(problem, f"{problem.answer}1")


def test_in_a_mixture():
    mixture = get_task("sums+chain_sum")
    problems = [mixture.problem("train", 0, index) for index in range(6)]
    assert [p.family for p in problems] == ["sums", "chain_sum"] * 3
    assert all(mixture.correct(p, p.answer) for p in problems)
    assert not any(mixture.correct(p, "x") for p in problems)


def test_there_are_enough_families():
    assert len(LEVELS) >= 41  # as in the report
    assert not set(LEVELS) & set(EXCLUDED)
    assert all(0 <= first <= last for first, last in LEVELS.values())


@pytest.mark.parametrize("family", LEVELS)
def test_own_answers_are_right(family):
    """At every level of the range, in training and held out."""
    task = ReasoningGym(family)
    first, last = LEVELS[family]
    for index in range(last - first + 1):
        problem = task.problem(("train", "heldout")[index % 2], 0, index)
        assert problem.prompt.strip()
        assert task.correct(problem, problem.answer), problem
        assert not task.correct(problem, "no answer at all")


@pytest.mark.parametrize("family", [family for family, why in EXCLUDED.items() if "does not accept" in why])
def test_those_left_out_deserve_it(family):
    gym = importlib.import_module("reasoning_gym")
    dataset = gym.create_dataset(family, size=1, seed=0)
    assert dataset.score_answer(answer=str(dataset[0]["answer"]), entry=dataset[0]) < 0.99
    with pytest.raises(UserError, match=f"task '{family}' of reasoning-gym is left out: its scorer"):
        get_task(family)


def test_a_scorer_that_accepts_anything():
    gym = importlib.import_module("reasoning_gym")
    entries = [gym.create_dataset("game_of_life_halting", size=1, seed=seed) for seed in range(20)]
    nonsense = [dataset.score_answer(answer="perhaps", entry=dataset[0]) for dataset in entries]
    assert max(nonsense) >= 0.99


def test_levels_make_it_harder():
    def longest(place):
        task = get_task(place)
        return max(len(task.problem("train", 0, index).prompt) for index in range(20))

    assert longest("chain_sum@0") < longest("chain_sum@2-3") < longest("chain_sum@9")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("chain_sums", r"'chain_sums' is neither built in \(sums, board, shop, guess\) nor .* chain_sum"),
        ("chain_sum@3-99", "levels go from 0 to 10; write chain_sum@0-10"),
        ("chain_sum@3-1", "levels go from 0 to 10"),
        ("chain_sum@x", "is neither built in"),
        ("composite", "makes no problems itself"),
    ],
)
def test_what_is_not_there(name, says):
    with pytest.raises(UserError, match=says):
        get_task(name)


def test_all_of_them_together():
    """Under the one weight that they are given."""
    task = get_task("logic=3+sums")
    families = [task.problem("train", 0, index).family for index in range(40)]
    assert families.count("sums") == 10
    assert len(set(families)) == 31
