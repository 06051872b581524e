import logging

import pytest

from m1jax.config import ModelConfig
from m1jax.train.estimate import spelt, warn_if_slow
from tests import tiny


def test_a_million_tokens_on_a_laptop(caplog, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2))
    config = ModelConfig.preset("m1-demo")
    with caplog.at_level(logging.WARNING):
        warn_if_slow(config, 2**14, 1024, 100, "batch-tokens 16384")
        assert not caplog.records
        warn_if_slow(config, 2**20, 2**15, 10_000, f"batch-tokens {2**20}")
    (record,) = caplog.records
    said = record.getMessage()
    assert "an update of 1,048,576 tokens takes 1.4e+13 operations: on 2 CPU cores some 6 minutes" in said
    assert "the whole training 43 days" in said
    assert "--batch-tokens 32768 would take some 12 seconds an update" in said


def test_small_models_take_long_too(caplog, monkeypatch):
    """Their products are quick: what is beside them decides, here with a million tokens on two cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2))
    warn_if_slow(ModelConfig.preset("m1-tiny"), 2**20, 512, 100, f"batch {2**11}")
    assert "on 2 CPU cores some 78 seconds" in caplog.text
    caplog.clear()
    warn_if_slow(tiny.CONFIG, 2**20, 512, 100, f"batch {2**11}")  # takes eight seconds
    assert not caplog.text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "a second"), (90, "90 seconds"), (300, "5 minutes"), (9e7, "3 years")]
)
def test_durations(seconds, words):
    assert spelt(seconds) == words
