"""The learning rate as the report runs it: up, constant, down."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.errors import UserError
from m1jax.train.optimizer import OptimizerConfig, updates_made


def test_warm_up_constant_and_decay():
    config = OptimizerConfig(learning_rate=8e-5, warmup_steps=4, constant_fraction=1 / 3, final_fraction=0.1)
    rates = [float(config.schedule(34)(step)) for step in range(34)]
    assert rates[:4] == pytest.approx([2e-5, 3.5e-5, 5e-5, 6.5e-5])
    assert rates[4:15] == pytest.approx([8e-5] * 11)
    assert rates[24] == pytest.approx((8e-5 + 8e-6) / 2)
    assert 8e-6 < rates[33] < 1.2e-5
    assert float(config.schedule(34)(34)) == pytest.approx(8e-6)
    with pytest.raises(UserError, match="constant_fraction = 2"):
        OptimizerConfig(learning_rate=1.0, constant_fraction=2)
    with pytest.raises(UserError, match="learning_rate = inf"):
        OptimizerConfig(learning_rate=float("inf"))


def test_short_batches_warm_up_and_decay_to_the_end():
    """Two of eight planned updates are made in each of ten generation batches: the warm-up counts those made, the decay
    the plan."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1)
    schedule = config.schedule(80)
    planned = [8 * batch + (update + 1) * 8 / 2 - 1 for batch in range(10) for update in range(2)]
    rates = [float(schedule(made, where)) for made, where in enumerate(planned)]
    assert rates[:2] == pytest.approx([0.25, 0.4375 * (1 - 0.9 * (7 - 4) / 76)])
    assert max(rates) == rates[4] > 0.8  # as soon as the warm-up has ended
    assert rates[-1] == pytest.approx(float(schedule(79)))
    assert rates[-1] < 0.12
    # A run whose batches are all full has one count.
    assert [float(schedule(n, n)) for n in range(80)] == [float(schedule(n)) for n in range(80)]


def test_the_rate_is_told_and_applied():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=2, weight_decay=0.1, clip_norm=1e9)
    optimizer = config.build(10)
    decayed, kept = jnp.ones((4, 3)), jnp.ones(3)
    params = {"moe": {"gate": decayed}, "norm": kept}
    state = optimizer.init(params)
    for made, rate in enumerate((0.25, 0.375, 0.5)):
        assert updates_made(state) == made
        updates: Any
        updates, state = optimizer.update({"moe": {"gate": 2 * decayed}, "norm": 2 * kept}, state, params)
        assert float(optax.tree.get(state, "learning_rate")) == rate
        np.testing.assert_allclose(updates["norm"], -rate, rtol=1e-6)  # AdamW of a constant gradient: its sign
        np.testing.assert_allclose(updates["moe"]["gate"], -rate * 1.1, rtol=1e-6)
