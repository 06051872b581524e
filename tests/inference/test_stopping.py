import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.inference.stopping import END_IDS, NEVER, REASONS, Stops, Thought, ended
from m1jax.inference.types import ThinkingBudget


def stops(rows, end_ids=(), certain=-0.01, patience=NEVER, run=0):
    ends = np.full((rows, END_IDS), -1)
    ends[:, : len(end_ids)] = end_ids
    full = lambda value, dtype: jnp.full(rows, value, dtype)  # noqa: E731
    return Stops(jnp.array(ends), full(certain, jnp.float32), full(patience, jnp.int32), full(run, jnp.int32))


def reasons(stops, tokens, logp, alive=True):
    after, found = ended(stops, jnp.array(tokens), jnp.array(logp), jnp.broadcast_to(jnp.array(alive), len(tokens)))
    return [REASONS[number] for number in found.tolist()], after.run.tolist()


def test_end_ids():
    assert reasons(stops(3, end_ids=(7, 0)), [7, 1, 0], [-1.0] * 3)[0] == ["stop", None, "stop"]


def test_repetition_counts_tokens_in_a_row():
    state, found = stops(1, patience=3), []
    for logp in [-0.001, -0.001, -1.0, -0.001, -0.001, -0.001]:
        state, reason = ended(state, jnp.array([5]), jnp.array([logp]), jnp.array([True]))
        found.append(REASONS[int(reason[0])])
    assert found == [None] * 5 + ["repetition"]


def test_rows_at_rest_stay_as_they_are():
    assert reasons(stops(2, end_ids=(7,), run=2), [7, 7], [-1.0, np.nan], [False, False]) == ([None, None], [2, 2])


def test_what_is_no_number_is_a_fault():
    assert reasons(stops(1, end_ids=(7,)), [7], [np.nan])[0] == ["fault"]


@pytest.mark.parametrize(
    ("opening", "prompt", "written", "left"),
    [
        ((), [1], [], 3),
        ((), [1], [5, 5], 1),
        ((), [1], [5, 5, 5], 0),
        ((), [1], [5, 5, 5, 5], 0),
        ((), [1], [5, 8, 9], None),
        ((), [8], [9, 5], 1),  # the prompt is no part of the thought
        ((), [1], [8, 8, 9], None),
        ((4,), [1], [5, 5], 3),  # not begun
        ((4,), [1], [4], 3),
        ((4,), [1], [4, 5], 2),
        ((4,), [4], [5], 2),
        ((4,), [4, 1], [5], 3),
        ((4, 4), [1, 4], [4, 5], 2),
        ((4, 4), [4], [5, 4, 4, 6, 6], 1),
        ((4,), [1], [4, 8, 9, 4, 5], None),  # closed for good
    ],
)
def test_thought(opening, prompt, written, left):
    budget = ThinkingBudget(tokens=3, close=(8, 9), open=opening)
    whole, piecewise = Thought(budget, prompt), Thought(budget, prompt)
    whole.feed(written)
    for token in written:
        piecewise.feed([token])
    assert whole.left == piecewise.left == left
