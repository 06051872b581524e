"""What is said of a training that goes wrong, and that nothing is said of one that does not."""

import pytest

from m1jax.rl.alarms import ALARMS, alarms

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


def test_every_alarm_is_tested():
    assert len(WRONG) == len(ALARMS)


def test_a_trend_needs_something_before_it():
    assert alarms([WELL | {"length": 3.0, "entropy": 0.001}]) == []
