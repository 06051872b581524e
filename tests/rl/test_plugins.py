"""Plug-ins of ten lines: found by name or file, combined by weights, and their errors cost one sample each."""

import importlib.metadata
import logging

import pytest

from m1jax.errors import UserError
from m1jax.rl.environment import SingleTurn, environment_of
from m1jax.rl.plugins import load_environment
from m1jax.rl.rewards import RewardRecipe, Unjudged, get_judge, score
from m1jax.rl.tasks import Problem, get_task
from m1jax.rl.types import Group
from m1jax.rl.weights import parse
from tests.rl.episodes import episode

PLUGINS = '''
from m1jax.rl.tasks import Problem

def one_more(rng):
    n = int(rng.integers(1000))
    return f"{n}+1=", n + 1

class Case:
    """Either case is right."""
    def draw(self, rng):
        return Problem("say " + str(rng.integers(1000)), "yes")
    def correct(self, problem, answer):
        if answer == "boom": raise RuntimeError("no idea")
        return answer.lower() == problem.answer

class Whole:
    def problem(self, split, seed, index):
        return Problem(f"{split}{seed}{index}", "a")
    def correct(self, problem, answer):
        return answer == "a"

def sometimes(rng):
    n = int(rng.integers(1000))
    if n % 2: raise ValueError(f"{n} is odd")
    return f"{n}=", n

def never(rng):
    return 1 / 0

class Length:
    def __init__(self):
        self.limit = 3
    def __call__(self, response):
        return float(len(response) <= self.limit)

class Twice:
    def reset(self, problem, rng):
        return [{"role": "user", "content": problem.prompt}]
    def step(self, text):
        return [], True

class Broken:
    def __init__(self):
        raise OSError("no licence")
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGINS)
    return path


@pytest.fixture
def installed(monkeypatch):
    """Entry points as an installed package would have them."""

    def offer(kind, **places):
        group = f"m1jax.{kind}s"
        entries = importlib.metadata.EntryPoints(
            importlib.metadata.EntryPoint(name, place, group) for name, place in places.items()
        )
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group, **chosen: entries.select(group=group, **chosen)
        )

    return offer


def test_a_function_is_a_task(file):
    task = get_task(f"{file}:one_more")
    problems = [task.problem("train", 0, index) for index in range(20)]
    assert problems[3] == task.problem("train", 0, 3)
    assert not {p.prompt for p in problems} & {task.problem("heldout", 0, index).prompt for index in range(20)}
    assert all(task.correct(p, p.answer) and not task.correct(p, "x") for p in problems)
    assert environment_of(task) is SingleTurn


def test_a_class_is_a_task(file):
    task = get_task(f"{file}:Case")
    problem = task.problem("train", 0, 0)
    assert task.correct(problem, "YES")
    assert not task.correct(problem, "no")
    whole = get_task(f"{file}:Whole")
    assert whole.problem("train", 1, 2).prompt == "train12"
    assert whole.correct(whole.problem("train", 1, 2), "a")


def test_installed_plug_ins(installed, monkeypatch):
    installed("task", counting="tests.rl.test_plugins:counting", nothing="tests.rl.test_plugins:PLUGINS")
    assert get_task("counting").problem("train", 0, 0).answer == "3"
    assert get_task("counting=2+sums").name == "counting+sums"
    with pytest.raises(UserError, match=r"task 'nothing': .* is no function or class; for example"):
        get_task("nothing")
    installed("reward", short="tests.rl.test_plugins:short")
    assert get_judge("short", get_task("sums"), 0.1)(Problem("q", "a"), episode("ab")).answer == 1
    with pytest.raises(UserError, match="or one of those that are installed: short"):
        get_judge("shorter", get_task("sums"), 0.1)
    installed("environment", once="m1jax.rl.environment:SingleTurn")
    assert load_environment("once") is SingleTurn


def counting(rng):
    return f"count to three, {rng.integers(1000)}", "3"


def short(response):
    return len(response) < 3


def test_problems_that_cannot_be_made_are_replaced(file, caplog):
    task = get_task(f"{file}:sometimes")
    with caplog.at_level(logging.WARNING):
        problems = [task.problem("train", 0, index) for index in range(20)]
    assert all(int(p.answer) % 2 == 0 for p in problems)
    assert f"task {file}:sometimes: {file}, line 24: ValueError: " in caplog.text
    assert "is odd, at problem " in caplog.text
    with pytest.raises(UserError, match="16 problems in a row could not be made"):
        get_task(f"{file}:never").problem("train", 0, 0)


def test_answers_that_cannot_be_judged_are_left_out(file, caplog):
    task = get_task(f"{file}:Case")
    problem = task.problem("train", 0, 0)
    with pytest.raises(Unjudged, match=r"mine\.py, line 13: RuntimeError: no idea, at 'boom', problem 'say "):
        task.correct(problem, "boom")
    texts = ["<think></think>yes", "<think></think>boom", "<think></think>no"]
    group = Group(problem, tuple(episode(text) for text in texts))
    (one,) = score([group], get_judge("rules", task, 0.1), RewardRecipe(), max_tokens=9)
    assert one.raw.tolist() == pytest.approx([1, 0.1])
    assert "1 of 3 responses are left out: task " in caplog.text


def test_rewards_are_added(file):
    judge = get_judge(f"rules+{file}:Length=0.5", get_task("sums"), 0.1)
    problem = Problem("q", "4")
    assert judge(problem, episode("<think></think>4")) == (1.0, 0.0, True)
    assert judge(problem, episode("abc")) == (0.5, 0.0, False)
    assert judge(problem, episode("<think></think>5")) == (0.0, 0.1, False)


def test_environments(file):
    assert load_environment(f"{file}:Twice")().step("x") == ([], True)
    with pytest.raises(UserError, match=r"has no reset\(problem, rng\)"):
        load_environment(f"{file}:Length")
    with pytest.raises(UserError, match=r"mine\.py, line \d+: OSError: no licence"):
        load_environment(f"{file}:Broken")
    with pytest.raises(UserError, match=r"mine\.py, line \d+: OSError: no licence"):
        get_task(f"{file}:Broken")
    with pytest.raises(UserError, match="has no draw"):
        get_task(f"{file}:Length")


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ("a", {"a": 1}),
        ("a=2+b", {"a": 2, "b": 1}),
        ({"a": 0.5, "f.py:b": 3}, {"a": 0.5, "f.py:b": 3}),
    ],
)
def test_combinations(given, weights):
    assert parse("task", given) == weights


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "no name in it"),
        ("a+", "no name in it"),
        ("a+a=2", "names one task twice: a"),
        ("a=x", "'x' is no weight"),
        ({"a": -1}, "-1 is no weight"),
        ({"a": "b"}, "'b' is no weight"),
        ({}, "the combination is empty"),
    ],
)
def test_what_is_no_combination(given, says):
    with pytest.raises(UserError, match=says):
        parse("task", given)
