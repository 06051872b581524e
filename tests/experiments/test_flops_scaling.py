"""Figure 1 (right) of the report, and our own FLOPs count against the compiler's."""

from pathlib import Path

import pytest

from experiments.flops_scaling import figure1
from m1jax import ModelConfig
from m1jax.flops import attention_flops, forward_flops, parameters_per_token

POINTS = Path(figure1.__file__).parent / "figure1_right.csv"


@pytest.mark.parametrize("model", figure1.FIGURE)
def test_figure_mode_passes_through_every_drawn_point(model):
    errors = figure1.deviations(POINTS)[model]
    assert len(errors) >= 16
    for n, error in errors.items():
        assert abs(error) <= (5e-3 if n == 1024 else 1e-3), n


def test_honest_mode():
    rows = {row["rival"]: row for row in figure1.table() if row["mode"] == "honest"}
    assert rows[figure1.R1]["ratio_64k"] == pytest.approx(0.446, abs=2e-3)
    assert rows[figure1.R1_ABSORBED]["ratio_128k"] == pytest.approx(0.098, abs=1e-3)
    n = rows[figure1.R1]["half_from_tokens"]
    ours, theirs = figure1.HONEST[figure1.M1], figure1.HONEST[figure1.R1]
    assert ours(n) <= 0.5 * theirs(n) < theirs(n)
    assert ours(n - 1) > 0.5 * theirs(n - 1)


def test_active_parameters_are_the_published_ones():
    config = ModelConfig.preset("m1-456b")
    active = parameters_per_token(config) - config.vocab_size * config.hidden_size
    assert round(active / 1e9, 2) == 45.94


def test_decoding_costs_what_prefill_costs():
    config = ModelConfig.preset("m1-456b")
    split = [attention_flops(config, 0, 300), attention_flops(config, 300, 301), attention_flops(config, 301, 1000)]
    assert sum(split) == attention_flops(config, 0, 1000)
    assert forward_flops(config, 700, start=300) + forward_flops(config, 300) == forward_flops(config, 1000)
