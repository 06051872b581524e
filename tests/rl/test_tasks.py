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
    step, times, start = int(problem.prompt[1]), int(problem.prompt[3]), int(problem.prompt[5:7])
    assert int(problem.answer) == (start + step * times) % 100
    assert problem.thinking is not None
    assert [int(problem.thinking[3 * i + 1 : 3 * i + 3]) for i in range(times)] == [
        (start + step * (i + 1)) % 100 for i in range(times)
    ]


def test_pieces_stay_on_the_board():
    for index in range(50):
        problem = get_task("board").problem("train", 0, index)
        right, up, times, square = int(problem.prompt[:2]), int(problem.prompt[2:4]), *problem.prompt[5:].split(":")
        file, rank = "abcdefgh".index(square[0]) + right * int(times), int(square[1]) - 1 + up * int(times)
        assert problem.answer == f"{'abcdefgh'[file % 8]}{rank % 8 + 1}"


def test_a_mixture_takes_turns():
    mixture = get_task("sums+board")
    problems = [mixture.problem("train", 0, index) for index in range(4)]
    assert [p.family for p in problems] == ["sums", "board", "sums", "board"]
    assert all(mixture.correct(p, p.answer) for p in problems)
