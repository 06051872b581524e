"""Pass rates: what is counted, what is kept, and that a run which goes on keeps the same."""

import collections
import json

import pytest

from m1jax.errors import UserError
from m1jax.rl import curriculum
from m1jax.rl.pass_rate import PassRate, Selected, estimate, select
from m1jax.rl.rewards import Verdict
from m1jax.rl.rollout import GenerationRecipe
from m1jax.rl.tasks import Problem, ProblemFile, UserProblems, get_task
from m1jax.rl.types import Group
from tests.rl.episodes import episode

PROBLEMS = [Problem(f"p{number}", str(number)) for number in range(11)]
ONE = [(0, [1.0])]
"""a single source"""


def attempt(first):
    """Ten attempts at each of two problems; problem n is solved n times. There are eleven problems."""
    numbers = [number % 11 for number in (first, first + 1)]
    return [
        Group(PROBLEMS[number], tuple(episode("right" if i < number else "wrong") for i in range(10)))
        for number in numbers
    ]


def judge(problem, one):
    return Verdict(float(one.turns[0] == "right"), 0.0, one.turns[0] == "right")


def test_rates_are_counted():
    rates = estimate(attempt, judge, 13)  # two of them a second time
    assert list(rates) == PROBLEMS
    assert rates[PROBLEMS[3]] == PassRate("p3", 3, 10)
    assert rates[PROBLEMS[1]] == PassRate("p1", 2, 20)
    assert [rate.kept for rate in rates.values()] == [False, *[True] * 8, False, False]


def test_what_is_kept_is_asked(tmp_path):
    sums, record = get_task("sums"), tmp_path / "pass_rates.jsonl"
    task = select(
        sums, lambda: estimate(attempt, judge, 11), record, {"task": "sums", "generation": GenerationRecipe()}, ONE
    )
    asked = collections.Counter(task.problem("train", 0, index) for index in range(80))
    assert asked == dict.fromkeys(PROBLEMS[1:9], 10)
    assert task.problem("heldout", 0, 4) == sums.problem("heldout", 0, 4)
    assert task.correct(PROBLEMS[1], "1")
    assert len(record.read_text().splitlines()) == 1 + 11
    same = {"task": "sums", "generation": GenerationRecipe()}
    again = select(sums, lambda: pytest.fail("estimated again"), record, same, ONE)
    assert [again.problem("train", 0, i) for i in range(80)] == [task.problem("train", 0, i) for i in range(80)]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"task": "board", "seed": 0}, "another task:"),
        ({"task": "sums", "seed": 1}, "another seed:"),
        (None, "another"),
    ],
)
def test_what_was_measured_for_something_else(tmp_path, caplog, other, says):
    """It is measured again, and so is a record that does not say what it is of."""
    record, wanted = tmp_path / "pass_rates.jsonl", {"task": "sums", "seed": 0}
    select(get_task("sums"), lambda: estimate(attempt, judge, 3), record, other or {}, ONE)
    if other is None:
        record.write_text("".join(record.read_text().splitlines(keepends=True)[1:]))
    task = select(get_task("sums"), lambda: {PROBLEMS[8]: PassRate("p8", 8, 10)}, record, wanted, ONE)
    assert {task.problem("train", 0, index) for index in range(9)} == {PROBLEMS[8]}
    assert says in caplog.text
    assert json.loads(record.read_text().splitlines()[0]) == {"measured_for": wanted}


def test_nothing_left():
    with pytest.raises(UserError, match=r"none of its problems has a pass rate above 0 and below 0\.9"):
        Selected(get_task("sums"), [], ONE)


def drawn(task, problems, texts=()):
    """Sources of the first 100 problems and of the hundred behind them."""
    chosen = Selected(task, problems, curriculum.stages_of(task, texts))
    sources = [chosen.problem("train", 0, index).source for index in range(200)]
    return [collections.Counter(sources[:100]), collections.Counter(sources[100:])]


def test_what_is_kept_comes_as_the_curriculum_says():
    """With the weights of the moment, however many problems of a source are kept."""
    task = get_task("sums+board")
    kept = [task.problem("train", 0, index) for index in range(14)][:11]
    stages = ["0:1,0", "100:1,3"]
    assert drawn(task, kept, stages) == [{"sums": 100}, {"sums": 25, "board": 75}]
    assert drawn(task, [*kept, *kept[::2]]) == [{"sums": 50, "board": 50}] * 2
    assert drawn(get_task("sums=4+board"), kept) == [{"sums": 80, "board": 20}] * 2


def test_a_source_without_problems(caplog):
    task = get_task("sums+board")
    sums = [problem for problem in (task.problem("train", 0, index) for index in range(9)) if problem.source == "sums"]
    assert drawn(task, sums, ["0:1,0", "100:1,3"]) == [{"sums": 100}] * 2
    assert "board: left out" in caplog.text
    with pytest.raises(UserError, match="curriculum: from problem 50 on no problem has a pass rate"):
        drawn(task, sums, ["0:1,0", "50:0,1"])


def test_files_keep_their_weights():
    def file(name, weight):
        return ProblemFile(name, [Problem(f"{name}{n}", str(n), source=name) for n in range(40)], weight)

    task = UserProblems([file("a", 1.0), file("b", 3.0)])
    kept = [task.problem("train", 0, index) for index in range(30)]
    assert drawn(task, kept) == [{"a": 25, "b": 75}] * 2
