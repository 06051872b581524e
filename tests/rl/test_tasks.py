"""The built-in families: right demonstrations, pure problems, held-out problems that are never trained on."""

import pytest

from m1jax.rl.tasks import BUILT_IN, get_task, split_response


@pytest.mark.parametrize("name", BUILT_IN)
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
