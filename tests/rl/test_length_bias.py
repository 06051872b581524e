"""The monitor's slope is the regression's; it warns of a judge that pays for length, and of no other."""

import dataclasses

import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl.rewards.length_bias import LengthBias, Slope


def groups(rng, count, *, bias=0.0, truth=0.0):
    """Groups of eight: lengths that depend on the problem; right by chance, and by length where `truth` is not zero; a
    noisy judge who follows the truth, and pays `bias` for a thousand tokens."""
    judged, verified = [], []
    for _ in range(count):
        hard = rng.uniform()
        lengths = (500 + 4000 * hard + 400 * rng.normal(size=8)).clip(50).astype(np.int64)
        centred = (lengths - lengths.mean()) / 1000
        correct = (rng.uniform(size=8) < (1 - 0.6 * hard) + truth * centred).astype(np.float32)
        scores = 0.8 * correct + 0.1 + 0.1 * rng.normal(size=8) + bias * centred
        judged.append((lengths, scores.astype(np.float32)))
        verified.append((lengths, correct))
    return judged, verified


def test_the_slope_is_that_of_a_regression_with_an_intercept_for_each_group():
    rng = np.random.default_rng(0)
    judged, _ = groups(rng, 5, bias=0.3)
    slope = Slope()
    for lengths, scores in judged:
        slope.add(lengths, scores)
    x = np.concatenate([lengths for lengths, _ in judged]).astype(float)
    design = np.column_stack([x, np.kron(np.eye(5), np.ones((8, 1)))])
    y = np.concatenate([scores for _, scores in judged]).astype(float)
    solution, residuals, *_ = np.linalg.lstsq(design, y)
    covariance = residuals[0] / (40 - 6) * np.linalg.inv(design.T @ design)
    assert slope.value == pytest.approx(solution[0], rel=1e-6)
    assert slope.error == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-6)
    assert slope.deviation == pytest.approx(np.sqrt(np.mean([np.var(lengths, ddof=1) for lengths, _ in judged])))


@pytest.mark.parametrize("seed", range(20))
def test_no_alarm_where_there_is_no_bias(seed):
    """Hard problems take long and go wrong; and where longer answers are better, a judge may say so."""
    rng = np.random.default_rng(seed)
    for truth in (0.0, 0.3):
        watch = LengthBias()
        assert [watch.observe(*groups(rng, 32, truth=truth)).alarm for _ in range(20)] == [None] * 20


@pytest.mark.parametrize("seed", range(5))
def test_alarm_where_there_is_bias(seed):
    rng = np.random.default_rng(seed)
    watch = LengthBias()
    for _ in range(5):
        assert watch.observe(*groups(rng, 32)).alarm is None
    findings = [watch.observe(*groups(rng, 32, bias=0.2)) for _ in range(20)]
    assert findings[-1].alarm is not None
    assert "recalibrate the judge" in findings[-1].alarm
    assert findings[-1].judge == pytest.approx(0.2, abs=0.08)
    assert findings[-1].z > 4


def test_without_any_truth_length_is_worth_nothing():
    rng = np.random.default_rng(0)
    watch = LengthBias()
    for _ in range(5):
        judged, _ = groups(rng, 32, bias=0.2)
        finding = watch.observe(judged, [])
    assert finding.truth == 0.0
    assert finding.alarm is not None


def test_too_little_to_say():
    watch = LengthBias()
    lengths, scores = np.array([10, 20]), np.array([0.0, 1.0], np.float32)
    assert watch.observe([], []) == (0.0, 0.0, 0.0, None)
    assert watch.observe([(lengths, scores)], []).alarm is None
    assert watch.observe([(np.array([7]), np.array([1.0]))], []).alarm is None
    same = np.full(8, 100)
    assert watch.observe([(same, np.arange(8.0))] * 9, [(same, np.arange(8.0))] * 9).alarm is None


def test_old_batches_fade():
    rng = np.random.default_rng(0)
    watch = LengthBias(half_life=3)
    for _ in range(20):
        watch.observe(*groups(rng, 32, bias=0.3))
    for _ in range(40):
        finding = watch.observe(*groups(rng, 32))
    assert finding.alarm is None
    assert abs(finding.judge - finding.truth) < 0.1


def test_goes_on_where_it_was():
    rng = np.random.default_rng(0)
    batches = [groups(rng, 8, bias=0.1) for _ in range(4)]
    watch = LengthBias()
    for batch in batches[:2]:
        watch.observe(*batch)
    kept = dataclasses.asdict(watch)
    again = LengthBias(**{**kept, "judge": Slope(**kept["judge"]), "truth": Slope(**kept["truth"])})
    for batch in batches[2:]:
        assert watch.observe(*batch) == again.observe(*batch)


@pytest.mark.parametrize("options", [{"half_life": 0}, {"z": 0}, {"gain": -1}, {"gain": 1}])
def test_values_out_of_range(options):
    with pytest.raises(UserError):
        LengthBias(**options)
