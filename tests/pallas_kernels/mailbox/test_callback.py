"""A program and its host talk, here by callbacks; `test_gpu_compiled.py` compiles what a GPU runs."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mailbox
from pallas_kernels.mailbox import Layout, callback

LAYOUT = Layout(rows=3, words=2)


@pytest.fixture
def memory():
    """(its address as programs want it, views of it)"""
    words = np.zeros(LAYOUT.size, np.uint32)
    place = words.ctypes.data
    yield np.array([place & 0xFFFFFFFF, place >> 32], np.uint32), mailbox.at(place, LAYOUT)
    assert words is not None  # kept until here


@jax.jit
def talk(address, first, asks):
    """Each step adds the first word of each row's answer to what it tells."""

    def step(i, carry):
        words, answers = carry
        answer = mailbox.ask(address, first + i, asks, words, LAYOUT)
        words = mailbox.tell(address, first + i, words + answer[:, 0].astype(jnp.int32), LAYOUT)
        return words, answers.at[i].set(answer)

    nothing = jnp.zeros((5, *answer_shape()), jnp.uint32)
    return jax.lax.fori_loop(0, 5, step, (jnp.arange(3), nothing))


def answer_shape():
    return LAYOUT.rows, LAYOUT.words


@pytest.mark.parametrize("first", [1, 2**31 - 3, -2], ids=["", "past the largest", "past zero"])
def test_every_answer_is_the_one_to_what_was_told_last(memory, first):
    address, views = memory
    views.answered[0] = (first - 1) % 2**32
    heard = []

    def answer():
        for number in range(first, first + 5):
            views.answers[:] = [[10 * (row + 1) + len(heard), number % 2**32] for row in range(3)]
            views.answered[0] = number % 2**32
            until = time.monotonic() + 20
            while not (views.numbers == number % 2**32).all():
                assert time.monotonic() < until
                time.sleep(0)
            heard.append(views.told.tolist())

    host = threading.Thread(target=answer)
    host.start()
    first_word = np.array(first, np.int64).astype(np.int32)
    words, answers = map(np.asarray, talk(address, first_word, np.array([True, False, True])))
    host.join()
    rows = np.arange(3)
    expected = rows
    for step in range(5):
        told = np.where([True, False, True], 10 * (rows + 1) + step, -1)
        expected = expected + told
        assert heard[step] == expected.tolist()
        assert answers[step, ::2].tolist() == [[10 + step, (first + step) % 2**32], [30 + step, (first + step) % 2**32]]
    assert words.tolist() == expected.tolist()
    assert (answers[:, 1] == 0xFFFFFFFF).all()  # who does not ask may do everything


def test_nobody_waits_for_nothing(memory):
    address, _ = memory
    answers = np.asarray(talk(address, np.int32(1), np.zeros(3, bool))[1])
    assert (answers == 0xFFFFFFFF).all()


def test_a_host_that_is_silent_allows_nothing(memory, monkeypatch):
    monkeypatch.setattr(callback, "SECONDS", 0.05)
    address, _ = memory
    asks = np.array([False, True, False])
    ask = jax.jit(lambda number: mailbox.ask(address, number, asks, number, LAYOUT))
    answer = np.asarray(ask(np.int32(1)))
    assert answer[1].tolist() == [0, 0]
    assert (answer[::2] == 0xFFFFFFFF).all()
