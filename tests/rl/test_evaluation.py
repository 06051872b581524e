"""Marks by hand, and against brute force."""

import itertools

import numpy as np
import pytest

from m1jax.rl.evaluation import Interval, majority, marks, pass_at, summary
from m1jax.rl.tasks import Problem
from m1jax.rl.tasks.verification import Verifier
from tests.rl.episodes import episode, scored


def test_pass_at_is_unbiased():
    """The mean over all ways to draw n of the attempts."""
    attempts, right = np.array([6, 6, 6, 5]), np.array([0, 2, 6, 1])
    for n in (1, 2, 3, 5):
        for found, a, r in zip(pass_at(n, attempts, right), attempts, right):
            drawn = list(itertools.combinations([True] * r + [False] * (a - r), n))
            assert found == pytest.approx(np.mean([any(d) for d in drawn]))


def answers(*texts, right, finish="stop"):
    episodes = [episode(f"<think>x</think>{text}", finish=finish) for text in texts]
    return scored([float(text == right) for text in texts], episodes=episodes)


def test_majority():
    assert majority(answers("3", "3", "4", right="3")) == 1
    assert majority(answers("3", "4", "4", right="3")) == 0
    assert majority(answers("3", "4", "4", "3", "5", right="3")) == 0.5  # two as common as each other
    assert majority(answers("3", "3", right="3", finish="length")) == 0  # nobody has answered


def test_spellings_of_one_answer_vote_together():
    texts, verifier = ("1/2", "0.5", r"\frac{1}{2}", "3", "3"), Verifier()
    halves = Problem("q", "0.5")
    group = scored(
        [float(verifier.correct(halves, text)) for text in texts],
        problem=halves,
        episodes=[episode(f"<think>x</think>{text}") for text in texts],
    )
    assert group.correct.tolist() == [True] * 3 + [False] * 2
    assert majority(group) == 0
    assert majority(group, verifier.same) == 1
    assert marks([group], verifier.same).majority.mean == 1
    assert not verifier.same(Problem("q", "0.5", verification="exact"), "1/2", "0.5")


def test_intervals():
    values = np.array([0.0, 1.0] * 50)
    found = Interval.of(values)
    assert found.mean == 0.5
    # A bootstrap of 100 coins: 1.96 * 0.05 either way.
    assert found.low == pytest.approx(0.402, abs=0.02)
    assert found.high == pytest.approx(0.598, abs=0.02)


def test_intervals_of_problems_that_are_all_alike():
    """Wilson's: from 0 to z^2 / (n + z^2) where none is right."""
    assert str(Interval.of(np.zeros(30))) == "0.0% [0.0%, 11.4%]"
    assert str(Interval.of(np.ones(30))) == "100.0% [88.6%, 100.0%]"
    assert str(Interval.of(np.zeros(1))) == "0.0% [0.0%, 79.3%]"
    half = Interval.of(np.array([0.5]))  # of the attempts at a single problem
    assert (half.low, half.high) == pytest.approx((0.0546, 0.9454), abs=1e-3)


def test_marks():
    groups = [answers("3", "3", "4", "5", right="3"), answers("1", "2", "2", right="1"), scored([], episodes=[])]
    found = marks(groups)
    assert (found.problems, found.k) == (2, 3)
    assert found.average.mean == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert sorted(found.passed) == [1, 2, 3]
    assert found.passed[1].mean == pytest.approx(found.average.mean)
    assert found.passed[3].mean == 1.0
    assert found.majority.mean == 0.5
    assert found.figures()["pass_at_3"] == 1.0


def test_summary():
    problem = Problem("q", "3", family="sums")
    one = answers("3", "4", right="3")
    cut = scored([0, 0], problem=problem, episodes=[episode("<think>", tokens=range(9), finish="length")] * 2)
    figures = summary([one, cut])
    assert figures["accuracy"] == 0.25
    assert figures["format"] == 0.5
    assert figures["zero_variance"] == 0.5
    assert (figures["finish_stop"], figures["finish_length"], figures["finish_repetition"]) == (0.5, 0.5, 0.0)
    assert (figures["length_p50"], figures["length_max"]) == (6, 9)
    assert (figures["reward_of_sums"], figures["reward_std"]) == (0.0, pytest.approx(np.std([1, 0, 0, 0])))
