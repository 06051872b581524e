"""Judges say what an episode is worth; scoring adds penalties and leaves out what cannot be judged."""

import logging

import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl.rewards import FunctionJudge, RewardRecipe, RuleJudge, Unjudged, Verdict, score
from m1jax.rl.rewards.scoring import overlong_penalty
from m1jax.rl.tasks import Problem, get_task
from m1jax.rl.types import Group
from tests.rl.episodes import episode

PROBLEM = Problem("2+2=", "4")


@pytest.mark.parametrize(
    ("text", "finish", "verdict"),
    [
        ("<think>two and two</think>4", "stop", (1, 0, True)),
        ("<think></think> 4 ", "stop", (1, 0, True)),
        ("<think>two and two</think>5", "stop", (0, 0.1, False)),
        ("<think>two and two</think>4", "length", (0, 0, False)),  # cut where it happens to look right
        ("4", "stop", (0, 0, False)),
        ("<think>a</think>", "stop", (0, 0, False)),
        ("<think>a<think>b</think>4", "stop", (0, 0, False)),
        ("", "stop", (0, 0, False)),
    ],
)
def test_rules(text, finish, verdict):
    judge = RuleJudge(get_task("sums"), 0.1)
    assert judge(PROBLEM, episode(text, finish=finish)) == Verdict(*verdict)


def test_overlong_penalty_is_a_ramp_in_tokens():
    lengths = np.array([1, 80, 85, 90, 100, 120])
    penalty = overlong_penalty(lengths, max_tokens=100, buffer_tokens=20)
    np.testing.assert_allclose(penalty, [0, 0, -0.25, -0.5, -1, -1])
    np.testing.assert_array_equal(overlong_penalty(lengths, max_tokens=100, buffer_tokens=0), 0)


def length_judge(problem, one):
    """Worth its first token; two cannot be judged."""
    if one.tokens[0] == 2:
        raise Unjudged("a two")
    return Verdict(float(one.tokens[0]), 0.5, one.tokens[0] >= 1)


def groups(*firsts):
    return [Group(PROBLEM, tuple(episode(tokens=(first, *[9] * extra)) for first, extra in row)) for row in firsts]


def test_scores_are_raw_and_shaped():
    """Of the tokens that the model wrote, none of the environment's."""
    (one,) = score(groups([(0, 1), (1, 3)]), length_judge, RewardRecipe(overlong_buffer=2), max_tokens=4)
    np.testing.assert_array_equal(one.raw, [0.5, 1.5])
    np.testing.assert_array_equal(one.rewards, [0.5, 0.5])
    np.testing.assert_array_equal(one.correct, [False, True])
    assert {name: part.tolist() for name, part in one.parts.items()} == {
        "answer": [0, 1],
        "format": [0.5, 0.5],
        "overlong": [0, -1],
    }


def test_what_cannot_be_judged_is_left_out_alone(caplog):
    with caplog.at_level(logging.WARNING):
        first, second = score(
            groups([(0, 0), (2, 0), (1, 0)], [(2, 0), (2, 0), (2, 0)]), length_judge, RewardRecipe(), max_tokens=4
        )
    assert [int(e.tokens[0]) for e in first.group.episodes] == [0, 1]
    np.testing.assert_array_equal(first.raw, [0.5, 1.5])
    assert len(second.group.episodes) == len(second.raw) == 0
    assert "4 of 6 responses are left out: a two" in caplog.text
    with pytest.raises(UserError, match="a two"):
        score(groups([(2, 0), (2, 0)]), length_judge, RewardRecipe(), max_tokens=4)


def test_a_format_reward_like_that_of_a_right_answer_is_refused():
    with pytest.raises(UserError, match=r"format_reward = 1\.0"):
        RewardRecipe(format_reward=1.0)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return path

    return write


def test_a_function_of_ones_own(file):
    path = file(
        "import numpy as np\n"
        "def reward(prompt, response, answer): return np.float32(answer in response) - len(prompt) / 100\n"
        "def brevity(response): return -len(response)\n"
        "def whole(finished, turns, scale=2): return scale * finished + (turns == ('4',))\n"
    )
    one = episode("4")
    assert FunctionJudge(f"{path}:reward")(PROBLEM, one) == pytest.approx((0.96, 0, False))
    assert FunctionJudge(f"{path}:brevity")(PROBLEM, one) == (-1, 0, False)
    assert FunctionJudge(f"{path}:whole")(PROBLEM, one) == (3, 0, True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "def reward(response):\n    return 1 / 0\n",
            r"py, line 2: ZeroDivisionError: division by zero, at 'abc'",
        ),
        ("def reward(response): return None\n", r"mine\.py:reward returned None, which is no finite number"),
        ("def reward(response): return 'good'\n", "returned 'good'"),
        ("def reward(response): return float('nan')\n", "returned nan"),
        ("def reward(response): return [1]\n", r"returned \[1\]"),
    ],
)
def test_errors_in_it_are_named_and_cost_the_sample(file, text, says):
    judge = FunctionJudge(f"{file(text)}:reward")
    with pytest.raises(Unjudged, match=says):
        judge(PROBLEM, episode("abc"))


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("", "{}", r"write FILE\.py:function"),
        ("", "none.py:reward", r"there is no file none\.py"),
        ("x = 1\n", "{}:reward", "has no function 'reward'"),
        ("reward = 1\n", "{}:reward", "has no function 'reward'"),
        ("def reward(respons): return 1\n", "{}:reward", "it takes respons; there are prompt, response, answer"),
        ("import nonsense_that_is_not_there\n", "{}:reward", r"mine\.py, line 1: ModuleNotFoundError"),
        ("def reward(response)\n", "{}:reward", r"mine\.py, line 1: SyntaxError"),
    ],
)
def test_what_is_no_reward_is_refused_at_once(file, text, place, says):
    with pytest.raises(UserError, match=says):
        FunctionJudge(place.format(file(text)))
