"""What is said of a training that goes wrong, and that nothing is said of one that does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax.rl.alarms import ALARMS, alarms
from m1jax.rl.conventions import CONVENTIONS
from m1jax.rl.diagnostics import of_updates
from m1jax.rl.evaluation import summary
from m1jax.rl.trainer import rl_loss
from m1jax.rl.types import RLBatch
from m1jax.train.statistics import on_host
from tests import tiny
from tests.rl.episodes import episode, scored

WELL = {
    "updates": 4,
    "zero_variance": 0.4,
    "length": 100.0,
    "pearson": 0.9999,
    "entropy": 0.8,
    "effective": 0.95,
    "clipped_mass_up": 0.01,
    "clipped_mass_down": None,
    "finish_length": 0.05,
}
WRONG = [
    ({"zero_variance": 0.95}, "95% of the groups have rewards that are all equal", "pass-rate filter"),
    ({"length": 40.0}, "collapsed from 100 to 40 tokens", "--overlong-buffer"),
    ({"pearson": 0.97}, "a correlation of 0.9700 only", "--old-policy trainer"),
    ({"entropy": 0.01}, "entropy has fallen from 0.800 to 0.010", "--max-weight"),
    ({"clipped_mass_down": 0.3}, "30% of the loss's mass lies in clipped tokens", "fewer --updates"),
    ({"effective": 0.2}, "leave 20% of the tokens effective", "--correction truncated"),
    ({"finish_length": 0.6}, "60% of the responses were cut", "--max-new-tokens"),
]


def test_all_is_well():
    assert alarms([]) == []
    assert alarms([WELL]) == []
    assert alarms([WELL] * 12) == []
    assert alarms([WELL, {"heldout_reward": 1.0}]) == []  # a record of an evaluation alone


@pytest.mark.parametrize(("wrong", "says", "try_"), WRONG)
def test_each(wrong, says, try_):
    (said,) = alarms([WELL, WELL, WELL | wrong])
    assert says in said
    assert try_ in said.partition("try")[2]


@pytest.mark.parametrize("stale", [{"staleness": 1}, {"older_tokens": 0.1}, {"waited": 2}])
def test_a_stale_batch_is_no_matter_of_numerics(stale):
    (said,) = alarms([WELL | {"pearson": 0.97} | stale])
    assert "it was older parameters that wrote" in said
    assert "head" not in said
    (said,) = alarms([WELL | {"pearson": 0.97} | dict.fromkeys(stale, 0)])
    assert "head" in said


def test_equal_rewards_are_no_sign_where_all_groups_are_kept():
    assert alarms([WELL | {"zero_variance": 0.95, "asked": 64, "kept": 64}]) == []
    assert alarms([WELL | {"zero_variance": 0.95, "asked": 64, "kept": 4}]) != []


def test_every_alarm_is_tested():
    assert len(WRONG) == len(ALARMS)


def test_a_trend_needs_something_before_it():
    assert alarms([WELL | {"length": 3.0, "entropy": 0.001}]) == []


def heard(*records):
    """Names of the alarms that are said of the last."""
    return {alarm.__name__ for alarm in ALARMS if alarm(records[-1], records[:-1])}


def test_what_responses_set_off():
    """Figures of real groups, not numbers made up for an alarm."""

    def figures(rewards, tokens, finish="stop"):
        return summary([scored(r, episodes=[episode(tokens=tokens, finish=finish)] * 2) for r in rewards])

    well, alike = [[0, 1]] * 20, [[0, 0]] * 19 + [[0, 1]]
    usual = figures(well, range(40)) | {"updates": 1}
    assert heard(usual, usual) == set()
    assert heard(usual, figures(alike, range(40)) | {"updates": 1}) == {"equal_rewards"}
    assert heard(usual, figures(well, range(9))) == {"short_responses"}
    assert heard(usual, figures(well, range(40), finish="length")) == {"truncated"}


@pytest.fixture(scope="module")
def measured():
    """(scale of the logits, log-ratios [4, 8]) -> figures of an update, by the loss itself on a tiny model"""
    loss = jax.jit(rl_loss(nnx.graphdef(tiny.model()), CONVENTIONS["paper"].objective))
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 256, (4, 9)), jnp.int32)
    advantage = np.repeat([1.0, -1.0], 2)[:, None] * np.ones((4, 8), np.float32)

    def figures(scale=1.0, gap=0.0):
        model = tiny.model()
        model.lm_head[...] = model.lm_head[...] * scale
        logp, _ = model.log_probs(model.forward(ids[:, :-1]).hidden, ids[:, 1:])
        batch = RLBatch(
            tokens=ids[:, :-1],
            targets=ids[:, 1:],
            segment_ids=jnp.zeros((4, 8), jnp.int32),
            mask=jnp.ones((4, 8), bool),
            weight=jnp.full((4, 8), 1 / 32),
            old_logp=logp - gap,
            advantage=jnp.asarray(advantage, jnp.float32),
        )
        _, stats = loss(nnx.split(model)[1], batch)
        return of_updates([on_host(stats)])

    return figures


def test_what_updates_set_off(measured):
    usual = measured()
    assert heard(usual, usual) == set()
    assert heard(usual, measured(scale=1e4)) >= {"no_entropy"}
    noise = np.random.default_rng(1).normal(0, 0.5, (4, 8))
    assert heard(usual, measured(gap=noise)) == {"numerics"}
    few = np.zeros((4, 8))
    few[0, :2] = 3.0  # two tokens of 32 at twenty times their old probability, above the cap of five
    assert heard(usual, measured(gap=few)) == {"numerics", "few_effective", "clipped_mass"}
