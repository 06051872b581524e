"""Scored groups become the updates' micro-batches: what is learned, how much each token counts, and where it is."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from m1jax.rl.advantages import Advantages
from m1jax.rl.conventions import CONVENTIONS
from m1jax.rl.prepare import _rounded, example, prepare, useful
from m1jax.rl.recipe import GenerationRecipe, LossRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.trainer import rl_loss
from m1jax.rl.types import RLBatch, Updates
from m1jax.train import statistics
from m1jax.train.step import accumulate
from pallas_kernels import PADDING
from tests import tiny
from tests.rl.episodes import episode, scored

RECIPE = RLRecipe(
    generation=GenerationRecipe(prompts=4, samples=3, max_prompt_tokens=4, max_new_tokens=6),
    update=UpdateRecipe(updates=2, row_length=10, rows=2),
)


def test_fields_are_aligned_to_the_position_that_predicts():
    """Only what the model wrote is learned, also after it was spoken to."""
    one = episode(prompt=(1, 2, 3), tokens=(4, 5, 6, 7), written=(True, True, False, True), logp=-0.5)
    batch = example(one, advantage=2.0, weight=0.25)
    np.testing.assert_array_equal(batch.tokens, [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(batch.targets, [2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(batch.mask, [0, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(batch.weight, [0, 0, 0.25, 0.25, 0, 0.25])
    np.testing.assert_array_equal(batch.advantage, [0, 0, 2, 2, 0, 2])
    np.testing.assert_array_equal(batch.old_logp, [0, 0, -0.5, -0.5, 0, -0.5])
    assert {name: values.dtype for name, values in batch.fields().items()} == {
        name: np.dtype(kind.dtype) for name, kind in RLBatch.columns().items()
    }


def test_penalties_make_no_group_useful():
    """Dynamic sampling looks at raw rewards: groups that differ in length alone teach nothing (DAPO)."""
    groups = [scored([1, 1, 1], rewards=[1, 0.5, 0]), scored([1, 0, 1]), scored([0, 0, 0]), scored([])]
    assert useful(groups, RECIPE) == [groups[1]]


@pytest.mark.parametrize("convention", ["ppo", "reinforce"])
def test_about_a_batchs_baseline_groups_of_equal_rewards_teach(convention):
    recipe = dataclasses.replace(RECIPE, loss=LossRecipe(convention=convention))
    groups = [scored([1, 1, 1]), scored([]), scored([1, 0, 0]), scored([0, 0, 0])]
    assert useful(groups, recipe) == [groups[0], *groups[2:]]
    batch = prepare(groups, recipe).batch
    # Rewards have a mean of 4/9 and a variance of 20/81; no response has an advantage of zero.
    right, wrong = (1 - 4 / 9) / (20 / 81) ** 0.5, -(4 / 9) / (20 / 81) ** 0.5
    values, counts = np.unique(batch.advantage[batch.mask], return_counts=True)
    np.testing.assert_allclose(values, [wrong, right], rtol=1e-6)
    assert counts.tolist() == [5 * 3, 4 * 3]
    assert len(prepare([groups[0], scored([1, 1, 1], rewards=[1, 0.5, 0])], recipe)) == 0  # here all are alike


def groups(count):
    """Group n of three episodes whose first token says n and which."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(count):
        lengths = rng.integers(1, 6, 3)
        episodes = [episode(prompt=(1, 2, 3), tokens=(10 * n + k, *range(100, 99 + m))) for k, m in enumerate(lengths)]
        made.append(scored([1, 0, 0.5], episodes=episodes))
    return made


@pytest.mark.parametrize(("count", "updates"), [(4, 2), (3, 2), (1, 1), (7, 2)])
def test_whole_groups_go_to_one_update(count, updates):
    made = groups(count)
    prepared = prepare(made, RECIPE)
    assert len(prepared) == updates
    where = {}
    for number, update in enumerate(prepared.remaining(0)):
        assert update.tokens.shape == (RECIPE.micro_batches, 2, 10)
        assert update.weight.sum() == pytest.approx(1)
        assert (update.weight[~update.mask] == 0).all()
        assert not update.mask[update.segment_ids == PADDING].any()
        mine = sorted({int(t) // 10 for t in update.targets[update.mask] if t < 100})
        for group in mine:
            where[group] = number
            # Every prompt has the same say in its update, every token in its prompt.
            total = made[group].lengths.sum()
            first = update.mask & (update.targets // 10 == group) & (update.targets < 100)
            np.testing.assert_allclose(update.weight[first], 1 / (total * len(mine)), rtol=1e-6)
            order = np.argsort(update.targets[first])
            np.testing.assert_array_equal(
                update.advantage[first][order], Advantages()(made[group].rewards, np.zeros(3, int))
            )
    assert sorted(where) == list(range(min(count, 4)))  # what is beyond P is left for nobody


def test_nothing_to_learn_is_no_update():
    prepared = prepare([scored([1, 1, 1])], RECIPE)
    assert len(prepared) == 0
    assert list(prepared.remaining(0)) == []


def test_a_resumed_run_may_cut_otherwise():
    """The same rows, in order, in micro-batches of another size."""
    prepared = prepare(groups(4), RECIPE)
    stored = Updates(RLBatch.of(**prepared.batch.fields()))
    for rows in (1, 2, 3):
        update = dataclasses.replace(RECIPE.update, rows=rows)
        recipe = dataclasses.replace(RECIPE, update=update)
        cut = stored.cut(rows, recipe.micro_batches)
        want = prepare(groups(4), recipe)
        assert len(cut) == len(want)
        for name, values in want.batch.fields().items():
            np.testing.assert_array_equal(getattr(cut.batch, name), values)


def test_shared_prompts_change_nothing_but_rounding():
    """Groups with their prompts apart, against rows of whole sequences: loss, statistics and every gradient."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(4):
        prompt = rng.integers(0, 250, rng.integers(1, 5))
        lengths = rng.integers(1, 7, 3 if n else 2)  # one response of the first could not be judged
        episodes = [episode(prompt=prompt, tokens=rng.integers(0, 250, m), logp=-5.0) for m in lengths]
        made.append(scored(rng.normal(size=len(lengths)), episodes=episodes))
    graph, params = nnx.split(tiny.model())
    loss_fn = rl_loss(graph, CONVENTIONS["paper"].objective, remat="none")
    # Loss, gradients and figures of one update, micro-batch by micro-batch.
    gradients = jax.jit(lambda params, batch: accumulate(loss_fn, params, batch, len(batch.tokens)))
    want = prepare(made, RECIPE)
    expectations = [(update, gradients(params, update)) for update in want.remaining(0)]
    for rows in (1, 3, 6):
        update = dataclasses.replace(RECIPE.update, share_prompts=True, rows=rows)
        found = prepare(made, dataclasses.replace(RECIPE, update=update))
        assert len(found) == len(want) == 2
        assert found.batch.prompts.shape == (2, 2 // max(1, rows // 3), max(1, rows // 3), 3)
        for a, (b, (want_grads, want_loss, want_stats)) in zip(found.remaining(0), expectations):
            assert a.mask.sum() == b.mask.sum()
            grads, loss, stats = gradients(params, a)
            np.testing.assert_allclose(loss, want_loss, rtol=1e-5, atol=1e-6)
            largest = max(float(np.abs(expected).max()) for expected in jax.tree.leaves(want_grads))
            for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
                np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-6 * largest)
            figures, others = (statistics.values(statistics.on_host(s)) for s in (stats, want_stats))
            del figures["pearson"], others["pearson"]  # of equal probabilities there is none, but for rounding
            assert figures == pytest.approx(others, rel=1e-4, abs=1e-6)


def test_sizes_are_few():
    assert [_rounded(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 513)] == [2, 2, 2, 3, 4, 6, 6, 8, 12, 12, 16, 768]
