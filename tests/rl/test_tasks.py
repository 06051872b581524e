"""Tasks: right demonstrations, pure problems, held-out problems that are never trained on, mixtures."""

import collections
import sys
from pathlib import Path

import pytest

from m1jax.errors import UserError
from m1jax.rl.tasks import BUILT_IN, AllProblems, Problem, ProblemFile, UserProblems, get_task, split_response
from m1jax.rl.tasks.base import Turns


@pytest.mark.parametrize("name", ["sums", "board"])
def test_demonstrations_are_right_and_reproducible(name):
    task = get_task(name)
    for index in range(50):
        problem = task.problem("train", 3, index)
        assert problem == task.problem("train", 3, index)
        for think in (True, False):
            thinking, answer = split_response(problem.demonstration(think)) or ("", "")
            assert task.correct(problem, answer)
            assert bool(thinking) == think
        assert not task.correct(problem, problem.answer + "0")


@pytest.mark.parametrize("name", BUILT_IN)
def test_held_out_problems_are_never_trained_on(name):
    task = get_task(name)
    train = {task.problem("train", seed, index).prompt for seed in range(3) for index in range(400)}
    heldout = {task.problem("heldout", seed, index).prompt for seed in range(3) for index in range(200)}
    assert len(heldout) > 100
    assert not train & heldout


def test_sums_add_up():
    problem = get_task("sums").problem("train", 0, 0)
    digits = [int(digit) for digit in problem.prompt[1:-1]]
    assert problem.prompt == f"+{''.join(map(str, digits))}="
    assert problem.thinking == "".join(str(sum(digits[: i + 1]) % 10) for i in range(len(digits)))
    assert problem.answer == str(sum(digits) % 10)


def test_pieces_move_as_instructed():
    for index in range(50):
        problem = get_task("board").problem("train", 0, index)
        moves, square = problem.prompt[:-1].split(":")
        file, rank = "abcdefgh".index(square[0]), int(square[1]) - 1
        squares = ""
        for across, along in zip(moves[::2], moves[1::2]):
            file = {"<": (file - 1) % 8, ">": (file + 1) % 8, "|": 7 - file}[across]
            rank = {"v": (rank - 1) % 8, "^": (rank + 1) % 8, "-": 7 - rank}[along]
            squares += f"{'abcdefgh'[file]}{rank + 1}"
        assert (problem.thinking, problem.answer) == (squares, squares[-2:])


def test_a_mixture_takes_turns():
    mixture = get_task("sums+board")
    problems = [mixture.problem("train", 0, index) for index in range(4)]
    assert [p.family for p in problems] == ["sums", "board", "sums", "board"]
    assert all(mixture.correct(p, p.answer) for p in problems)


@pytest.mark.parametrize(
    ("weights", "order"),
    [((1, 1, 1), [0, 1, 2]), ((3, 1), [0, 0, 1, 0]), ((1, 2.5), [1, 0, 1, 1, 1, 0, 1]), ((7,), [0])],
)
def test_turns_follow_the_weights(weights, order):
    turns = Turns(weights)
    found = [turns[index] for index in range(3 * len(order))]
    assert [source for source, _ in found] == 3 * order
    for source in range(len(weights)):  # every source is gone through one by one
        assert [number for s, number in found if s == source] == list(range(3 * order.count(source)))


def test_a_mixture_by_weights():
    mixture = get_task({"sums": 3, "board": 1})
    assert collections.Counter(mixture.problem("train", 0, index).family for index in range(40)) == {
        "sums": 30,
        "board": 10,
    }


def test_many_odd_weights_come_close():
    weights = [1 + number / 97 for number in range(50)]
    turns = Turns(weights)
    found = collections.Counter(turns[index][0] for index in range(20_000))
    for source, weight in enumerate(weights):
        assert found[source] / 20_000 == pytest.approx(weight / sum(weights), rel=0.05)


def test_one_task_twice_is_no_mixture():
    with pytest.raises(UserError, match="names one task twice"):
        get_task("sums+sums")


def test_an_unknown_task_without_reasoning_gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"'sum' is not built in \(sums, board, shop, guess\), and reasoning-gym"):
        get_task("sum")


def user(*files):
    return UserProblems(
        [
            ProblemFile(path, [Problem(*pair, family=Path(path).stem) for pair in pairs], weight)
            for path, pairs, weight in files
        ]
    )


def test_problems_of_ones_own():
    task = user(("data/easy.jsonl", [(f"{n}+0=", str(n)) for n in range(40)], 1.0))
    train = [task.problem("train", 0, index) for index in range(70)]
    heldout = [task.problem("heldout", 0, index) for index in range(5)]
    assert len({p.prompt for p in train[:35]}) == 35  # every pass has each once
    assert sorted(p.prompt for p in train[:35]) == sorted(p.prompt for p in train[35:])
    assert [p.prompt for p in train[:35]] != [p.prompt for p in train[35:]]
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    assert {p.family for p in (*train, *heldout)} == {"easy"}  # not the path: accuracy is counted by it
    assert task.problem("train", 0, 3) == train[3]
    assert task.correct(train[0], train[0].answer + ".0")
    assert not task.correct(train[0], "wrong")


def test_several_files_are_mixed_by_weight():
    """And what is held out of one is not trained on in another."""
    shared = [(f"{n}*1=", str(n)) for n in range(20)]
    task = user(("a.jsonl", shared, 3.0), ("b/c.jsonl", [*shared, *((f"{n}*2=", str(2 * n)) for n in range(20))], 1.0))
    train = [task.problem("train", 1, index) for index in range(400)]
    assert collections.Counter(p.family for p in train) == {"a": 300, "c": 100}
    heldout = {task.problem("heldout", 1, index).prompt for index in range(20)}
    assert len(heldout) == 40 // 8
    assert not heldout & {p.prompt for p in train}


def test_an_evaluation_asks_everything():
    """However few they are: nothing is held out."""
    files = [ProblemFile("x.jsonl", [Problem("a", "0.5")]), ProblemFile("y.jsonl", [Problem("c", "d")])]
    for some in (files[:1], files[1:], files):
        assert AllProblems(some).problems == [problem for file in some for problem in file.problems]
    task = AllProblems([*files, files[0]])
    assert [task.problem("heldout", 0, index).prompt for index in range(3)] == ["a", "c", "a"]
    assert task.correct(task.problems[0], "1/2")


def test_files_with_too_little_are_refused():
    with pytest.raises(UserError, match=r"x\.jsonl: 1 different prompts"):
        user(("x.jsonl", [("a", "b"), ("a", "c")], 1.0))
    with pytest.raises(UserError, match=r"[xy]\.jsonl: all its 1 prompts are held out"):
        user(("x.jsonl", [("a", "b")], 1.0), ("y.jsonl", [("c", "d")], 1.0))
