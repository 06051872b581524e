"""What a journal remembers after any end, and what the processes learn of each other from them."""

import os
import time

import pytest

from m1jax.convert import journal
from m1jax.convert.journal import Journal, OtherFailed


@pytest.fixture
def opened(tmp_path):
    journals = []

    def open_journal(process=0, count=1, identity="abc"):
        journals.append(Journal(tmp_path, identity, process, count))
        return journals[-1]

    yield open_journal
    for each in journals:
        each.close()


def test_goes_on_where_it_was(opened, tmp_path):
    first = opened()
    first.copy(3)
    first.copy(5)
    first.verify(3, 77)
    first.close()
    with open(tmp_path / ".journal-0", "a") as file:
        file.write("v 5")  # killed while it wrote
    second = opened()
    assert (second.copied, second.verified) == ({3, 5}, {3: 77})
    assert opened(identity="other").copied == set()  # of another conversion, which it replaces
    assert opened().copied == set()


@pytest.mark.parametrize("useless", [False, True])
def test_after_a_failure(opened, useless):
    first = opened()
    first.copy(3)
    first.fail("the disk\nis full", useless=useless)
    assert opened().copied == (set() if useless else {3})


def test_failures_reach_the_others(opened, monkeypatch):
    monkeypatch.setattr(journal, "LOOK_EVERY", 0.0)
    first, second = opened(0, 2), opened(1, 2)
    first.check_others()
    second.fail("NaN in x", useless=True)
    with pytest.raises(OtherFailed, match="process 1 of 2 gave up: NaN in x"):
        first.check_others()
    with pytest.raises(OtherFailed, match="process 1 of 2 gave up: NaN in x"):
        first.await_others(2)


def test_failures_of_an_earlier_attempt_have_a_minute_to_go_away(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "LOOK_EVERY", 0.0)
    opened(1, 2).fail("NaN in x", useless=True)
    earlier = time.time() - 10
    os.utime(tmp_path / ".journal-1", (earlier, earlier))
    first = opened(0, 2)
    first.check_others()
    second = opened(1, 2)  # started again
    first.verify(0, 5)
    second.verify(1, 6)
    assert first.await_others(2) == {0: 5, 1: 6}
    second.fail("again", useless=False)
    os.utime(tmp_path / ".journal-1", (earlier, earlier))
    first.check_others()
    monkeypatch.setattr(journal, "PATIENCE", 0.0)
    with pytest.raises(OtherFailed, match="again"):
        first.check_others()


def test_who_is_missing_is_told(opened, monkeypatch, capsys):
    first, second = opened(0, 3), opened(1, 3)
    for number in (0, 3):
        first.verify(number, number)
    second.verify(1, 1)

    def sleep(_):  # meanwhile
        second.verify(4, 4)
        opened(2, 3).verify(2, 2)
        opened(2, 3).verify(5, 5)

    monkeypatch.setattr(time, "sleep", sleep)
    assert first.await_others(6) == {number: number for number in range(6)}
    assert capsys.readouterr().err == "waiting for process 1, 2\n"
    first.remove()
