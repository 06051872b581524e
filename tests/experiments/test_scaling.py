"""The cases are sound, and a trace is added up rightly."""

import types

import pytest

from experiments.scaling import trace
from experiments.scaling.cases import Sizes, cases
from m1jax.sharding import check_shardable, parse_mesh


@pytest.mark.parametrize("cards", [2, 4, 8])
def test_cases_can_be_sharded_and_compared(cards):
    found = {case.name: case for case in cases(cards, Sizes())}
    assert len(found) == len(cases(cards, Sizes()))
    for case in found.values():
        assert case.cards <= cards
        assert case.rows % case.micro_batches == 0
        check_shardable(case.config, parse_mesh(case.mesh), batch=case.rows, time=case.tokens)
        if case.same:
            one = found[case.same]
            assert (one.cards, one.rows, one.tokens, one.preset) == (1, case.rows, case.tokens, case.preset)
        if case.beside:
            assert found[case.beside].cards == 1


def event(name, start, length):
    return types.SimpleNamespace(name=name, start_ns=start * 1e6, duration_ns=length * 1e6)


def test_what_shows_of_collectives():
    card = [
        event("gemm", 0, 4),
        event("ncclDevKernel", 3, 4),
        event("gemm", 5, 1),
        event("RaggedAllToAllKernelImpl", 9, 1),
    ]
    found, lines = trace.summary([card, card])
    # Alone they run from 4 to 5, from 6 to 7 and from 9 to 10; between 7 and 9 nothing does.
    assert found == pytest.approx({"span": 10, "kernels": 8, "collectives": 5, "exposed": 3})
    assert lines[0].split() == ["5.000", "ms", "2", "x", "gemm"]


def test_a_trace_without_cards():
    assert trace.summary([]) == ({}, [])
