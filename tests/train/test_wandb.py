"""What is sent to Weights & Biases, to a stand-in that keeps it."""

import sys
import types

import pytest

from m1jax.errors import UserError
from m1jax.train.run import Run


@pytest.fixture
def library(monkeypatch):
    """`wandb`, as far as it is used."""
    kept = types.SimpleNamespace(begun=[], logged=[], metrics=[], finished=0)

    class Sent:
        def define_metric(self, name, step_metric=None):
            kept.metrics.append((name, step_metric))

        def log(self, values):
            kept.logged.append(values)

        def finish(self):
            kept.finished += 1

    module = types.ModuleType("wandb")
    module.init = lambda **options: kept.begun.append(options) or Sent()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return kept


def test_figures_are_sent(library, tmp_path):
    for number in range(2):  # and again when the run goes on
        run = Run(tmp_path / "first", {"seed": 0, "at": tmp_path}, wandb="maths")
        run.record("sft", 1, {"nll": 2.5, "by_update": [1.0], "mfu": None})
        run.record("rl", 0, {"reward": 0.5})
        run.close()
        run.close()
        assert library.finished == number + 1
    one, two = library.begun
    assert one == two
    assert (one["project"], one["name"], one["resume"]) == ("maths", "first", "allow")
    assert one["config"] == {"seed": 0, "at": str(tmp_path)}
    assert library.logged[:2] == [{"sft/step": 1, "sft/nll": 2.5}, {"rl/step": 0, "rl/reward": 0.5}]
    assert ("rl/*", "rl/step") in library.metrics
    Run(tmp_path / "first", {"seed": 0, "at": tmp_path}).record("rl", 1, {"reward": 0.5})
    assert len(library.logged) == 4  # not asked for


def test_what_can_go_wrong(library, tmp_path, monkeypatch):
    def refused(**options):
        raise ConnectionError("api_key not configured\nsee the documentation")

    sys.modules["wandb"].init = refused
    with pytest.raises(UserError, match=r"--wandb maths: it does not begin \(api_key not configured\); log in"):
        Run(tmp_path / "run", {}, wandb="maths")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'm1jax\[wandb\]'"):
        Run(tmp_path / "run", {}, wandb="maths")
