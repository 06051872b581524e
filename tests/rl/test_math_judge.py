"""Answers are judged as mathematics; what happens to the helper process is no judgement."""

import logging
import os
import signal
import threading

import pytest

from m1jax.errors import UserError
from m1jax.rl.math_judge import MathJudge


@pytest.fixture(scope="module")
def shared():
    judge = MathJudge()
    yield judge
    judge.close()


@pytest.fixture
def judge(shared):
    """With a helper that runs."""
    assert shared.equal("1", "1.0")
    return shared


@pytest.mark.parametrize(
    ("expected", "answer", "equal"),
    [
        (" 7", "7 ", True),
        ("0.5", r"$\frac12$", True),
        (r"$\sqrt{8}$", r"$2\sqrt{2}$", True),
        ("4", "5", False),
        ("4", "", False),
        ("4", "((((", False),
        ("4", "\x00\n[]", False),
    ],
)
def test_answers(judge, expected, answer, equal):
    assert judge.equal(expected, answer) == equal


def test_an_answer_that_takes_too_long_is_wrong(caplog):
    judge = MathJudge(cpu_seconds=1)
    assert not judge.equal("4", "$9^{9^{9^{9}}}$")
    assert judge.equal("0.5", r"$\frac12$")  # by a new helper
    assert not caplog.records  # it was the answer's fault: nothing to tell
    judge.close()


def helper(judge):
    return judge._process.pid


def test_a_killed_helper_costs_no_answer(judge, caplog):
    os.kill(helper(judge), signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        assert judge.equal("0.5", r"$\frac12$")
    assert "was killed by SIGKILL" in caplog.text


def test_a_helper_that_is_stuck_costs_no_answer(shared, caplog):
    judge = MathJudge(patience=120)
    assert judge.equal("1", "1.0")
    judge._patience = 1.0
    os.kill(helper(judge), signal.SIGSTOP)

    def forgive():  # a new helper must first start, on a busy machine
        judge._patience = 120

    threading.Timer(0.5, forgive).start()
    with caplog.at_level(logging.WARNING):
        assert judge.equal("0.5", r"$\frac12$")
    assert "was silent for" in caplog.text
    judge.close()


def test_helpers_that_are_killed_again_and_again_stop_the_run(judge, monkeypatch):
    """Rather than count a right answer as wrong."""
    start = MathJudge._start

    def doomed(self):
        process = start(self)
        os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(MathJudge, "_start", doomed)
    judge.close()
    with pytest.raises(UserError, match="killed by SIGKILL, and another one was killed by SIGKILL"):
        judge.equal("0.5", r"$\frac12$")


def test_an_answer_that_crashes_the_helper_is_wrong(judge, monkeypatch, caplog):
    start = MathJudge._start

    def crashing(self):
        process = start(self)
        os.kill(process.pid, signal.SIGSEGV)
        return process

    monkeypatch.setattr(MathJudge, "_start", crashing)
    judge.close()
    with caplog.at_level(logging.WARNING):
        assert not judge.equal("0.5", "$strange$")
    assert "counts as wrong" in caplog.text
