"""The RL loop as a whole, with a judge whose verdicts are known beforehand."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from m1jax.chat import Tokenizer
from m1jax.checkpoint import Checkpoints
from m1jax.errors import UNTRAINED, UserError
from m1jax.rl.recipe import EvaluationRecipe, GenerationRecipe, LossRecipe, RewardRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.rewards import Verdict
from m1jax.rl.tasks import Problem
from m1jax.rl.trainer import Trainer
from m1jax.rl.window import WindowRecipe
from m1jax.train import guards
from m1jax.train.meter import MEASURED
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run
from tests import tiny

RECIPE = RLRecipe(
    optimizer=OptimizerConfig(learning_rate=1e-2),
    generation=GenerationRecipe(prompts=2, samples=2, rounds=2, max_prompt_tokens=8, max_new_tokens=8, chat=False),
    update=UpdateRecipe(updates=2, row_length=16, rows=2),
    evaluation=EvaluationRecipe(evaluate_every=10, evaluate_rounds=1),
    iterations=2,
)


class Numbers:
    """Problems that say which they are."""

    name = "numbers"

    def problem(self, split, seed, index):
        return Problem(f"{index}", "x", family="number")

    def correct(self, problem, answer):
        return False


def judge_of(*differ):
    """A judge whose verdicts differ within the groups of these problems only."""

    def judge(problem, episode):
        return Verdict(float(int(problem.prompt) in differ and episode.tokens.sum() / 10_000), 0.0, False)

    return judge


def train(directory, recipe=RECIPE, judge=None):
    run = Run(directory, {"recipe": recipe})
    trainer = Trainer(run, tiny.model(), Numbers(), Tokenizer.tiny(), recipe, 0, judge=judge)
    try:
        params = jax.tree.leaves(nnx.split(trainer.train())[1])
    finally:
        run.log.close()
    return params, [{name: r[name] for name in r if name not in MEASURED} for r in run.log.records]


def test_nothing_to_learn_is_told(tmp_path, capsys):
    """As it happens, with what to try; and a run that never made an update ends with a status of its own."""
    with pytest.raises(SystemExit) as ending:
        train(tmp_path / "run", judge=judge_of())
    assert ending.value.code == UNTRAINED
    said = capsys.readouterr().out
    for batch in (1, 2):
        assert (
            f"generation batch {batch}: no update: the responses to each of 4 problems were all rewarded alike" in said
        )
    assert "(0 problems all right, 4 all wrong)" in said
    assert "try easier problems" in said
    assert "not one update was made in 2 generation batches" in said
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r.get("asked"), r.get("kept"), r.get("updates")) for r in records] == [
        (0, None, None, None),
        (1, 4, 0, 0),
        (2, 4, 0, 0),
    ]
    assert {name for name in records[0] if name.startswith("heldout_accuracy")} == {
        "heldout_accuracy",
        "heldout_accuracy_low",
        "heldout_accuracy_high",
        "heldout_accuracy_number",
    }
    with pytest.raises(SystemExit) as ending:  # nor the same command again
        train(tmp_path / "run", judge=judge_of())
    assert ending.value.code == UNTRAINED


def test_groups_are_refilled_and_counted_before_they_are_cut(tmp_path):
    """Batch 1: problem 0 of the first round, 2 and 3 of the second: three useful groups, of which P = 2 are trained on.
    Batch 2: the first round will do."""
    _, records = train(tmp_path / "run", judge=judge_of(0, 2, 3, 4, 5))
    assert [(r["asked"], r["kept"], r["updates"]) for r in records[1:]] == [(4, 3, 2), (2, 2, 2)]


def test_short_batches(tmp_path, monkeypatch):
    """One of two planned updates in each of three batches: the schedule comes to its end all the same, and checkpoints
    come where they are due though their distance divides nothing."""
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, **rest: (saved.append(step), save(self, step, **rest)))
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, final_fraction=0.1)
    generation = dataclasses.replace(RECIPE.generation, rounds=1)
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, generation=generation, iterations=3, checkpoint_every=3)
    _, records = train(tmp_path / "run", recipe, judge_of(0, 2, 4))
    assert [r["updates"] for r in records[1:]] == [1, 1, 1]
    full = optimizer.schedule(6)
    assert [r["learning_rate"] for r in records[1:]] == pytest.approx([float(full(n, 2 * n + 1)) for n in range(3)])
    assert records[-1]["learning_rate"] == pytest.approx(float(full(5)))
    assert saved == [4, 6]


def test_a_skipped_update_spoils_no_record(tmp_path, monkeypatch, capsys):
    check = guards.NonFiniteGuard.check

    def first_is_bad(self, step, skipped, batch, figures):
        return check(self, step, float(step == 1), batch, figures)

    monkeypatch.setattr(guards.NonFiniteGuard, "check", first_is_bad)
    recipe = dataclasses.replace(RECIPE, on_nonfinite="skip", iterations=1)
    _, records = train(tmp_path / "run", recipe, judge_of(0, 1))
    assert "update 1 is left out" in capsys.readouterr().out
    assert (records[1]["updates"], records[1]["skipped"]) == (1, 1)
    assert records[1]["kl_k3_by_update"][0] is None
    assert records[1]["kl_k3"] == records[1]["kl_k3_by_update"][1] > 0
    assert records[1]["grad_norm"] > 0
    assert "sampler_gap" not in records[1]  # of the first update, which there is not


def test_an_extended_run_says_what_it_did_not_make_ahead(tmp_path, capsys):
    recipe = dataclasses.replace(RECIPE, staleness=1, iterations=1)
    train(tmp_path / "run", recipe, judge_of(*range(9)))
    assert "was extended" not in capsys.readouterr().out
    _, records = train(tmp_path / "run", dataclasses.replace(recipe, iterations=3), judge_of(*range(9)))
    assert [r["staleness"] for r in records[1:]] == [0, 0, 1]
    said = "generation batch 2: written by version 1 of the parameters instead of 0, because the run had ended before"
    out = capsys.readouterr().out
    assert said in out
    assert out.count("was extended") == 1


def test_a_longer_run_with_other_rows_goes_on(tmp_path):
    """From the middle of a generation batch too; the rows of its micro-batches were cut before."""
    want, records = train(tmp_path / "whole", dataclasses.replace(RECIPE, iterations=2), judge_of(*range(9)))
    stopped = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(guards.StopRequests, "requested", lambda self: not stopped and not stopped.append(1))
    with pytest.raises(SystemExit):
        train(tmp_path / "run", dataclasses.replace(RECIPE, iterations=1), judge_of(*range(9)))
    monkey.undo()
    assert [p.name for p in (tmp_path / "run/checkpoints/rl").glob("[0-9]*")] == ["1"]
    update = dataclasses.replace(RECIPE.update, rows=1)
    other = dataclasses.replace(RECIPE, update=update, evaluation=EvaluationRecipe(evaluate_rounds=1, evaluate_every=1))
    got, others = train(tmp_path / "run", other, judge_of(*range(9)))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert [r["step"] for r in others] == [0, 1, 2]
    for a, b in zip(others, records):
        for name in b.keys() - {"phase"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: LossRecipe(max_weight=0.28), r"max_weight = 0\.28 .* did you mean 1\.28\?"),
        (lambda: LossRecipe(max_weight=float("nan")), "max_weight = nan"),
        (lambda: RLRecipe(generation=GenerationRecipe(samples=1)), "samples = 1"),
        (lambda: RewardRecipe(overlong_buffer=-1), "overlong_buffer = -1"),
        (
            lambda: RLRecipe(reward=RewardRecipe(overlong_buffer=1025)),
            "overlong_buffer = 1025 would punish every response: it must not exceed max_new_tokens = 1024",
        ),
        (
            lambda: RLRecipe(reward=RewardRecipe(overlong_buffer=600), window=WindowRecipe(windows=(512, 1024))),
            "it must not exceed the first of windows = 512",
        ),
        (lambda: WindowRecipe(window_nearness=1.5), r"window_nearness = 1\.5 is never reached"),
        (lambda: LossRecipe(kl_coefficient=float("inf")), "kl_coefficient = inf must be a finite number"),
        (lambda: GenerationRecipe(temperature=float("inf")), "temperature = inf must be a finite number"),
        (lambda: EvaluationRecipe(evaluate_temperature=float("inf")), "evaluate_temperature = inf must be"),
        (lambda: UpdateRecipe(rows=0), "rows = 0"),
        (lambda: EvaluationRecipe(evaluate_every=0), "evaluate_every = 0"),
        (lambda: RLRecipe(iterations=0), "iterations = 0"),
        (lambda: RLRecipe(update=UpdateRecipe(row_length=8)), "row_length = 8 must hold a prompt and its response"),
    ],
)
def test_recipes_that_cannot_be(wrong, says):
    with pytest.raises(UserError, match=says):
        wrong()


@pytest.mark.parametrize("convention", ["gspo", "dppo-tv"])
def test_rivals_train(tmp_path, capsys, convention):
    recipe = dataclasses.replace(RECIPE, loss=LossRecipe(convention=convention), iterations=1)
    _, records = train(tmp_path / "run", recipe, judge_of(0, 1))
    assert f"loss: objective {convention.split('-')[0]}(" in capsys.readouterr().out
    assert records[1]["updates"] == 2
    assert records[1]["grad_norm"] > 0
