"""Expected times beside what was measured (docs/gpu.md, experiments/scaling)."""

import pytest

from m1jax.config import ModelConfig
from m1jax.plan import hardware
from m1jax.plan.expected import expected
from m1jax.plan.memory import memory
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
        ("h200", "m1-2b", {}, 192.9),
        ("h200", "m1-1b", {}, 125.5),
        ("h200", "m1-1b", {"rows": 1, "context": 32_768}, 143.4),
        ("h100", "m1-2b", {"rows": 1, "context": 131_072, "remat": "layers"}, 1031.0),
        ("h200", "m1-2b", {"rows": 1, "context": 131_072, "remat": "layers"}, 1058.0),
        ("h200", "m1-2b", {"rows": 1, "context": 32_768}, 214.1),
        ("h200", "m1-2b", {"micro_batches": 4}, 794.3),
        ("h200", "m1-2b", {"mesh": "data=2", "rows": 16}, 223.6),
        ("h200", "m1-2b", {"mesh": "data=4", "rows": 32}, 227.0),
        ("h200", "m1-2b", {"mesh": "fsdp=2", "rows": 16}, 235.2),
        ("h200", "m1-2b", {"mesh": "fsdp=4", "rows": 32}, 232.1),
        ("h200", "m1-2b", {"mesh": "expert=2", "rows": 16}, 237.7),
    ],
)
def test_updates(chip, preset, changes, measured):
    assert milliseconds(chip, setup(preset, **changes)) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("preset", "sequences", "measured"),
    [("m1-2b", 1, 0.599), ("m1-2b", 64, 1.657), ("m1-2b", 256, 2.856), ("m1-1b", 64, 1.242)],
)
def test_decoding(preset, sequences, measured):
    planned = setup(preset, task="generate", context=160, rows=sequences, sequences=1)
    assert milliseconds("h200", planned) == pytest.approx(measured, rel=0.15)


def test_exchanges_show_where_work_waits_for_them():
    rates = hardware.CHIPS["h100"].rates
    assert rates is not None
    assert "exchanges" not in expected(setup(), rates)
    behind, waited_for, alone = (
        expected(setup(mesh=mesh, **sizes), rates)["exchanges"]
        for mesh, sizes in (
            ("fsdp=4", {"rows": 32}),
            ("tensor=4", {"rows": 32}),
            ("fsdp=4", {"rows": 4, "context": 256}),
        )
    )
    assert 0 < behind < alone  # of as many bytes, with too little work to hide behind
    assert behind < waited_for


def test_recomputing_layers_takes_longer():
    assert milliseconds("h200", setup(remat="layers")) > 1.15 * milliseconds("h200", setup())


@pytest.mark.parametrize(
    ("mesh", "rows", "micro_batches", "gigabytes"),
    [("", 8, 1, 45.5), ("", 8, 4, 51.1), ("data=4", 32, 1, 44.5), ("fsdp=2", 16, 1, 30.8), ("fsdp=4", 32, 1, 24.3)],
)
def test_memory_of_a_gpu(mesh, rows, micro_batches, gigabytes):
    """What the compiled program takes (experiments/scaling)."""
    planned = setup(mesh=mesh, rows=rows, micro_batches=micro_batches)
    assert sum(memory(planned).values()) / 1e9 == pytest.approx(gigabytes, rel=0.1)
