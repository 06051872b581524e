"""Weights that change on the way."""

from collections import Counter

import pytest

from m1jax.errors import UserError
from m1jax.rl import curriculum
from m1jax.rl.curriculum import Curriculum
from m1jax.rl.tasks import get_task


def test_stages_in_their_proportions():
    """Nothing of a source is left out or repeated where the weights change."""
    turns = Curriculum([(0, [1.0, 0.0, 0.0]), (10, [3.0, 1.0, 0.0]), (30, [1.0, 1.0, 2.0])], 3)
    drawn = [turns[index] for index in range(70)]
    shares = [Counter(source for source, _ in drawn[a:b]) for a, b in ((0, 10), (10, 30), (30, 70))]
    assert [[share[source] for source in range(3)] for share in shares] == [[10, 0, 0], [15, 5, 0], [10, 10, 20]]
    for source in range(3):
        mine = [count for s, count in drawn if s == source]
        assert mine == list(range(len(mine)))
    assert [turns[index] for index in (69, 12, 31)] == [drawn[index] for index in (69, 12, 31)]


def test_a_mixture_follows():
    task = get_task("sums+board")
    curriculum.follow(task, curriculum.stages_of(task, ["0:1,0", "4:0,1"]))
    assert [task.problem("train", 0, index).source for index in range(8)] == ["sums"] * 4 + ["board"] * 4


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (["5:1,1"], "the first must be 0"),
        (["0:1,1", "0:1,2"], "each later than the last"),
        (["0:1"], "1 weights from problem 0 on, for 2 sources"),
        (["0=1,1"], "write START:WEIGHT"),
        (["0:0,0"], "one at least is more"),
        (["0:-1,1"], "zero or more"),
    ],
)
def test_what_is_refused(stages, says):
    with pytest.raises(UserError, match=says):
        curriculum.stages_of(get_task("sums+board"), stages)


def test_without_stages_weights_are_the_tasks_own():
    task = get_task("sums=3+board")
    drawn = [task.problem("train", 0, index) for index in range(12)]
    stages = curriculum.stages_of(task, [])
    assert stages == [(0, [3.0, 1.0])]
    curriculum.follow(task, stages)
    assert [task.problem("train", 0, index) for index in range(12)] == drawn


def test_a_single_source_has_no_curriculum():
    with pytest.raises(UserError, match="a single source"):
        curriculum.stages_of(get_task("sums"), ["0:1"])
