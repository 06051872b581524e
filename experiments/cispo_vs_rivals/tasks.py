"""The four tasks as arrays: prompts, demonstrations and rewards, everything of fixed length.

A response is an answer, then END; or an answer, RECHECK, another try, END. The last answer counts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TASKS = ("recheck", "neutral", "harmful", "chain_sum")
RECHECKS, NEUTRAL, HARMFUL, CHAIN_SUM = range(len(TASKS))

PLUS, MINUS, EQUALS, RECHECK, END, NOTHING = range(10, 16)  # 0-9 are the digits
FIRST_TASK = 16
VOCABULARY = FIRST_TASK + len(TASKS)

PROMPT = 7
"""tokens: the task, five of the problem, EQUALS"""
RESPONSE = 8
BASE = 5
"""digits of the first three tasks are below it"""
RARE = 0.01
"""share of demonstrations that recheck"""
WRONG = 0.5
"""share of demonstrations whose answer is wrong, where a right one could be learned"""


class Judged(NamedTuple):
    reward: Float[Array, " rows"]
    written: Bool[Array, "rows response"]
    """up to END, END included"""
    rechecked: Bool[Array, " rows"]


def prompt(key: Array, task: Int[Array, ""]) -> Int[Array, " prompt"]:
    """A problem drawn at random, int32 [PROMPT]."""
    key, key_digits, key_signs = jax.random.split(key, 3)
    digits = jax.random.randint(key_digits, (5,), 0, jnp.where(task == CHAIN_SUM, 10, BASE))
    signs = jnp.array([PLUS, MINUS])[jax.random.randint(key_signs, (2,), 0, 2)]
    chain = jnp.stack([digits[0], signs[0], digits[1], signs[1], digits[2]])
    problem = jnp.where(task == CHAIN_SUM, chain, digits)
    return jnp.concatenate([FIRST_TASK + task[None], problem, jnp.array([EQUALS])]).astype(jnp.int32)


def demonstration(key: Array, task: Int[Array, ""]) -> tuple[Int[Array, " time"], Float[Array, " response"]]:
    """Tokens int32 [PROMPT + RESPONSE] and the weight of each response token in the loss.

    Half of them recheck, so that what follows is learned; the weights where the choice is made give RECHECK the share
    RARE there.
    """
    keys = jax.random.split(key, 4)
    problem = prompt(keys[0], task)
    first, second = _attempt(keys[1], problem), _attempt(keys[2], problem)
    second = jnp.where(task == HARMFUL, jax.random.randint(keys[2], (3,), 0, BASE), second)
    rechecks = jax.random.bernoulli(keys[3])
    nothing = jnp.full(RESPONSE, NOTHING)
    short = nothing.at[:2].set(jnp.stack([first[2], END]))
    sums = jnp.cumsum(problem[1:6])[1:] % BASE
    recheck = jnp.concatenate([first[2:], jnp.array([RECHECK]), sums, jnp.array([END, NOTHING])])
    retry = nothing.at[:4].set(jnp.stack([first[2], RECHECK, second[2], END]))
    chain = nothing.at[:4].set(jnp.concatenate([first, jnp.array([END])]))
    chain_retry = jnp.concatenate([first, jnp.array([RECHECK]), second, jnp.array([END])])
    with_it = jnp.stack([recheck, retry, retry, chain_retry])[task]
    without = jnp.where(task == CHAIN_SUM, chain, short)
    response = jnp.where(rechecks, with_it, without).astype(jnp.int32)
    choice = jnp.arange(RESPONSE) == jnp.where(task == CHAIN_SUM, 3, 1)
    weight = jnp.where(choice, 2 * jnp.where(rechecks, RARE, 1 - RARE), 1.0) * (response != NOTHING)
    return jnp.concatenate([problem, response]), weight


def judge(prompts: Int[Array, "rows prompt"], responses: Int[Array, "rows response"]) -> Judged:
    """Reward 1 where a response is ended and its last answer is right, else 0."""

    def one(problem: Array, response: Array) -> Judged:
        ends = response == END
        ended, end = jnp.any(ends), jnp.argmax(ends)
        right = _right(problem)
        last = response[jnp.maximum(end - jnp.arange(3, 0, -1), 0)]
        same = jnp.where(problem[0] == FIRST_TASK + CHAIN_SUM, jnp.all(last == right) & (end >= 3), last[2] == right[2])
        written = (jnp.arange(RESPONSE) <= end) | ~ended
        reward = (ended & same & (end >= 1)).astype(jnp.float32)
        return Judged(reward, written, jnp.any((response == RECHECK) & written))

    return jax.vmap(one)(prompts, responses)


def _right(problem: Int[Array, " prompt"]) -> Int[Array, "3"]:
    """The right answer: sign and two digits for CHAIN_SUM, else only the last of the three tells."""
    task, x = problem[0] - FIRST_TASK, problem[1:6]
    total = x[0] + jnp.where(x[1] == PLUS, x[2], -x[2]) + jnp.where(x[3] == PLUS, x[4], -x[4])
    digit = jnp.where(task == RECHECKS, jnp.sum(x) % BASE, x[1])
    return jnp.where(task == CHAIN_SUM, _spelt(total), digit)


def _spelt(value: Int[Array, ""]) -> Int[Array, "3"]:
    size = jnp.abs(value)
    return jnp.stack([jnp.where(value < 0, MINUS, PLUS), size // 10, size % 10])


def _attempt(key: Array, problem: Int[Array, " prompt"]) -> Int[Array, "3"]:
    """An answer as the demonstrations' author gives it without working it out."""
    key_wrong, key_by, key_any = jax.random.split(key, 3)
    task, x = problem[0] - FIRST_TASK, problem[1:6]
    wrong = jax.random.bernoulli(key_wrong, WRONG)
    total = x[0] + jnp.where(x[1] == PLUS, x[2], -x[2]) + jnp.where(x[3] == PLUS, x[4], -x[4])
    by = jax.random.randint(key_by, (), 1, 4) * jnp.where(jax.random.bernoulli(key_any), 1, -1)
    other = (x[1] + jax.random.randint(key_by, (), 1, BASE)) % BASE
    digit = jnp.where(task == RECHECKS, jax.random.randint(key_any, (), 0, BASE), jnp.where(wrong, other, x[1]))
    return jnp.where(task == CHAIN_SUM, _spelt(jnp.where(wrong, total + by, total)), digit)
