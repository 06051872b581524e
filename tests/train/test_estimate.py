import logging

import pytest

from m1jax.config import ModelConfig
from m1jax.train.estimate import spelt, warn_if_slow


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
    assert "the whole training 42 days" in said
    assert "--batch-tokens 32768 would take some 11 seconds an update" in said


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "a second"), (90, "90 seconds"), (300, "5 minutes"), (9e7, "3 years")]
)
def test_durations(seconds, words):
    assert spelt(seconds) == words
