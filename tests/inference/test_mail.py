"""The host's side of the mailbox, with a program played by another thread."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.inference.guides import Guides
from m1jax.inference.mail import Mailbox


@pytest.fixture
def mailbox():
    return Mailbox(2, 1, jnp.zeros(1))


def test_numbers_go_round(mailbox):
    mailbox._number = 2**31 - 3
    assert mailbox.numbers(4) == 2**31 - 2
    assert mailbox.numbers(1) == -(2**31) + 2
    mailbox.answer(-(2**31) + 2)
    assert mailbox._memory.answered.view("int32")[0] == -(2**31) + 2


def test_nobody_waits_for_a_program_that_has_failed(mailbox):
    def wait():
        with pytest.raises(RuntimeError, match="has failed"):
            mailbox.hear(1)

    waiting = threading.Thread(target=wait)
    waiting.start()
    with pytest.raises(KeyError), mailbox.closed_by_failure():
        raise KeyError
    waiting.join(timeout=10)
    assert not waiting.is_alive()


class Broken:
    """A sequence whose matcher fails."""

    matcher = True

    def allowed(self):
        raise KeyError("broken")


def test_a_program_gets_its_answers_even_from_a_matcher_that_fails(mailbox):
    """It would stand still else, and the device with it."""
    memory = mailbox._memory

    def program():
        while memory.answered[0] != 4:
            time.sleep(0.001)
        memory.numbers[:] = 4

    running = threading.Thread(target=program)
    running.start()
    guides = Guides([Broken()], [3], np.array([0]), 2, 32)
    with pytest.raises(KeyError, match="broken"):
        guides.answer(mailbox, 1, 4)
    running.join(timeout=10)
    assert not running.is_alive()
