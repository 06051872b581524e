"""What a training would do, in figures that can be counted by hand."""

import dataclasses

import pytest

from m1jax.flops import forward_flops, training_flops
from m1jax.rl import dry_run
from m1jax.rl.recipe import EvaluationRecipe, GenerationRecipe, RLRecipe, UpdateRecipe
from tests import tiny

ASKED = GenerationRecipe(prompts=4, samples=2, rounds=10, max_prompt_tokens=8, max_new_tokens=16)
RECIPE = RLRecipe(
    generation=ASKED,
    update=UpdateRecipe(updates=99, row_length=24),
    evaluation=EvaluationRecipe(evaluate_every=4, evaluate_rounds=3),
    iterations=10,
)


@pytest.fixture
def seconds(monkeypatch):
    """Those that are spelt, in their order, on a device of one operation a second."""
    found = []
    monkeypatch.setattr(dry_run, "_speed", lambda: 1.0)
    monkeypatch.setattr(dry_run, "spelt", lambda value: found.append(value) or "some")
    return found


def test_rounds_are_in_the_figures(seconds):
    said = "\n".join(dry_run.described(tiny.CONFIG, RECIPE))
    assert "asked: at most 40 problems a batch" in said
    assert f"at most {40 * 2 * 16:,} written and {4 * 2 * 24:,} trained on a batch" in said
    assert f"{10 * 40 * 2 * 16:,} and {10 * 4 * 2 * 24:,} in all" in said
    problem = forward_flops(tiny.CONFIG, 8) + 2 * forward_flops(tiny.CONFIG, 16, start=8) / dry_run.DECODING
    update = training_flops(tiny.CONFIG, 4 * 2 * 24, 4 * 2 * 24 * 25 / 2)
    # Before, after batches 4 and 8, and at the end.
    held = 4 * 12 * problem
    assert "held-out problems: 12 before, after, and every 4 batches: 4 times" in said
    assert seconds == pytest.approx([40 * problem, update, held, 10 * (40 * problem + update) + held])


def test_no_more_updates_than_problems(seconds):
    said = "\n".join(dry_run.described(tiny.CONFIG, RECIPE))
    assert "at most 4 updates each (1 problems an update): 40 updates" in said


def test_a_queue_begins_more_than_it_takes(seconds):
    queue = dataclasses.replace(RECIPE, generation=dataclasses.replace(ASKED, fifo_window=6))
    said = "\n".join(dry_run.described(tiny.CONFIG, queue))
    assert f"at most {46 * 2 * 16:,} written" in said
    assert f"{406 * 2 * 16:,} and" in said
    again = 12 * forward_flops(tiny.CONFIG, 24)
    problem = forward_flops(tiny.CONFIG, 8) + 2 * forward_flops(tiny.CONFIG, 16, start=8) / dry_run.DECODING
    assert seconds[0] == pytest.approx(46 * problem + again)


def test_generation_beside_training(seconds):
    dry_run.described(tiny.CONFIG, dataclasses.replace(RECIPE, staleness=1))
    generating, updating, held, everything = seconds
    assert everything == pytest.approx(10 * generating + updating + held)
    assert generating > updating
