"""Expected times beside what was measured (docs/gpu.md, experiments/scaling)."""

import pytest

from m1jax.config import ModelConfig
from m1jax.plan import hardware
from m1jax.plan.expected import expected
from m1jax.plan.memory import memory
from m1jax.plan.setup import Setup
from m1jax.plan.speed import exchanges
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
        ("h200", "m1-2b", {}, 192.4),
        ("h200", "m1-1b", {}, 121.7),
        ("h200", "m1-1b", {"rows": 1, "context": 32_768}, 135.0),
        ("h100", "m1-2b", {"rows": 1, "context": 131_072, "remat": "layers"}, 1031.0),
        ("h200", "m1-2b", {"rows": 1, "context": 131_072, "remat": "layers"}, 1058.0),
        ("h200", "m1-2b", {"rows": 1, "context": 32_768}, 194.1),
        ("h200", "m1-2b", {"micro_batches": 4}, 794.3),
    ],
)
def test_updates(chip, preset, changes, measured):
    assert milliseconds(chip, setup(preset, **changes)) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"mesh": "data=2", "rows": 16}, 204.7),
        ({"mesh": "fsdp=2", "rows": 16}, 205.1),
        ({"mesh": "expert=2", "rows": 16}, 207.3),
        ({"mesh": "tensor=2", "rows": 16}, 233.7),
        ({"mesh": "sequence=2", "rows": 2, "context": 32_768}, 218.1),
        ({"mesh": "data=2"}, 122.4),
    ],
)
def test_updates_on_two_cards(changes, measured):
    assert milliseconds("h200", setup(**changes)) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("preset", "sequences", "mesh", "measured"),
    [
        ("m1-2b", 1, "", 0.599),
        ("m1-2b", 64, "", 1.502),
        ("m1-2b", 256, "", 2.71),
        ("m1-1b", 64, "", 1.242),
        ("m1-2b", 128, "data=2", 1.52),
        ("m1-2b", 64, "tensor=2", 1.418),
        ("m1-2b", 64, "expert=2", 1.32),
    ],
)
def test_decoding(preset, sequences, mesh, measured):
    planned = setup(preset, mesh, task="generate", context=160, rows=sequences, sequences=1)
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


def test_what_a_forward_pass_waits_for():
    """Where tensor cuts, twice a layer for attention and for the experts; weights and gradients are on their way."""
    waited = {e.purpose: e.waited / e.bytes for e in exchanges(setup(mesh="fsdp=2,tensor=2", rows=16), "gpu")}
    assert waited["tokens to all experts and back"] == pytest.approx(2 / 5)
    assert waited["tokens gathered for attention"] == pytest.approx((2 * 8 + 4) / (5 * 8 + 4))
    assert waited["expert weights"] == waited["other weights"] == 0


def test_gradients_are_summed_over_sequence_as_over_data():
    over_data, over_sequence = (
        next(e.bytes for e in exchanges(setup(mesh=mesh, rows=2), "gpu") if e.purpose == "gradients")
        for mesh in ("data=2", "sequence=2")
    )
    assert over_data == over_sequence


def test_recomputing_layers_takes_longer():
    assert milliseconds("h200", setup(remat="layers")) > 1.15 * milliseconds("h200", setup())


@pytest.mark.parametrize(
    ("preset", "changes", "gigabytes"),
    [
        ("m1-2b", {}, 45.4),
        ("m1-2b", {"micro_batches": 4}, 51.1),
        ("m1-2b", {"rows": 1, "context": 131_072, "remat": "layers"}, 48.6),
        ("m1-1b", {}, 30.0),
        ("m1-2b", {"mesh": "data=2", "rows": 16}, 43.9),
        ("m1-2b", {"mesh": "fsdp=2", "rows": 16}, 30.9),
        ("m1-2b", {"mesh": "expert=2", "rows": 16}, 34.6),
        ("m1-2b", {"mesh": "tensor=2", "rows": 16}, 30.5),
        ("m1-2b", {"mesh": "sequence=2", "rows": 2, "context": 32_768}, 43.9),
    ],
)
def test_memory_of_a_gpu(preset, changes, gigabytes):
    """What the compiled program takes (experiments/scaling, docs/gpu.md)."""
    assert sum(memory(setup(preset, **changes), "gpu").values()) / 1e9 == pytest.approx(gigabytes, rel=0.1)


def test_recomputing_layers_keeps_residuals_alone():
    kept, recomputed = (memory(setup(remat=remat), "gpu") for remat in ("cheap", "layers"))
    assert recomputed["activations"] == 8 * 8 * 4096 * 2048 * 2
    assert sum(recomputed.values()) < sum(kept.values())
