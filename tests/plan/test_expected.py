"""Expected times beside what was measured (docs/gpu.md, experiments/scaling)."""

import pytest

from m1jax.config import ModelConfig
from m1jax.plan import hardware
from m1jax.plan.expected import expected
from m1jax.plan.setup import Setup
from m1jax.sharding import parse_mesh


def setup(preset="m1-2b", mesh="", **changes):
    kept = {"task": "sft", "context": 4096, "rows": 8, "remat": "cheap", "sequences": 4}
    return Setup(**{"model": ModelConfig.preset(preset), "mesh": parse_mesh(mesh), **kept, **changes})


def milliseconds(chip, planned):
    rates = hardware.CHIPS[chip].rates
    assert rates is not None
    return 1e3 * sum(expected(planned, rates).values())


@pytest.mark.parametrize(
    ("chip", "preset", "changes", "measured"),
    [
        ("h200", "m1-2b", {}, 202.4),
        ("h200", "m1-1b", {}, 131.2),
        ("h200", "m1-1b", {"rows": 1, "context": 32_768}, 151.0),
        ("h100", "m1-2b", {"rows": 1, "context": 131_072, "remat": "layers"}, 1031.0),
    ],
)
def test_updates(chip, preset, changes, measured):
    assert milliseconds(chip, setup(preset, **changes)) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("chip", "sequences", "measured"),
    [("h200", 64, 1.88), ("h200", 256, 3.44), ("h100", 64, 2.45), ("h100", 256, 4.28)],
)
def test_decoding(chip, sequences, measured):
    planned = setup(task="generate", context=160, rows=sequences, sequences=1)
    assert milliseconds(chip, planned) == pytest.approx(measured, rel=0.15)


def test_exchanges_show_where_work_waits_for_them():
    rates = hardware.CHIPS["h100"].rates
    assert rates is not None
    assert "exchanges" not in expected(setup(), rates)
    assert "exchanges" not in expected(setup(mesh="fsdp=4", rows=32), rates)  # behind the work
    assert expected(setup(mesh="tensor=4", rows=32), rates)["exchanges"] > 0
    assert expected(setup(mesh="fsdp=4", rows=4, context=256), rates)["exchanges"] > 0  # too little work


def test_recomputing_layers_takes_longer():
    assert milliseconds("h200", setup(remat="layers")) > 1.15 * milliseconds("h200", setup())
