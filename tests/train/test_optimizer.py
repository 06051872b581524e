"""The learning rate as the report runs it: up, constant, down."""

import pytest

from m1jax.errors import UserError
from m1jax.train.optimizer import OptimizerConfig


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
