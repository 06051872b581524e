"""How all ops choose and refuse implementations."""

import importlib
import pkgutil
import types

import pytest

import pallas_kernels
from pallas_kernels import ladder, target
from pallas_kernels.experts import api as experts
from pallas_kernels.lightning import api as lightning
from pallas_kernels.lightning.ring import api as ring
from pallas_kernels.softmax import api as softmax
from pallas_kernels.softmax.decode import api as pages

LADDERS = [
    lightning.LADDER,
    lightning.DECODE_LADDER,
    ring.LADDER,
    softmax.LADDER,
    pages.LADDER,
    experts.LADDER,
]


@pytest.mark.parametrize("rungs", LADDERS, ids=lambda rungs: rungs.op)
def test_every_implementation_is_a_module_that_says_what_it_takes(rungs):
    assert {rungs.portable}.union(*rungs.preferred.values()) <= set(rungs.implementations)
    for name in rungs.implementations:
        assert callable(rungs.module(name).unsupported)
    assert rungs.module(rungs.portable).unsupported is ladder.always


@pytest.fixture
def rungs(monkeypatch):
    """Of an op that takes one number: "fast" takes even ones, "slow" all."""
    modules = {
        "fast": types.SimpleNamespace(unsupported=lambda x: f"it takes even numbers: got {x}" if x % 2 else None),
        "slow": types.SimpleNamespace(unsupported=ladder.always),
    }
    monkeypatch.setattr(ladder.Ladder, "module", lambda self, name: modules[name])
    return ladder.Ladder(
        op="op", package="nowhere", implementations=("fast", "slow"), preferred={"gpu": ("fast",)}, portable="slow"
    )


@pytest.mark.parametrize(
    ("platform", "number", "chosen"), [("gpu", 2, "fast"), ("gpu", 3, "slow"), ("cpu", 2, "slow"), ("other", 2, "slow")]
)
def test_auto_takes_the_best_that_can_run(rungs, monkeypatch, platform, number, chosen):
    monkeypatch.setattr(target, "target_platform", lambda: platform)
    assert rungs.choose("auto", number) == chosen


def test_a_named_one_runs_or_says_why_not(rungs):
    assert rungs.choose("fast", 2) == "fast"
    with pytest.raises(ValueError, match="op: implementation 'fast' cannot run here: it takes even numbers: got 3"):
        rungs.choose("fast", 3)
    with pytest.raises(ValueError, match=r"op: implementation must be 'auto' or one of \('fast', 'slow'\): got 'best'"):
        rungs.choose("best", 2)


def test_no_function_shadows_a_module():
    for _, name, _ in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels."):
        parent, _, last = name.rpartition(".")
        shadow = getattr(importlib.import_module(parent), last, None)
        assert shadow is None or isinstance(shadow, types.ModuleType), name
