"""Groups come back from a checkpoint as they were."""

import dataclasses

import numpy as np
import pytest

from m1jax.rl.stored import from_arrays, to_arrays
from m1jax.rl.tasks import Problem
from tests.rl.episodes import episode, scored


def routed(one):
    positions = len(one.prompt) + len(one.tokens) - 1
    routes = np.random.default_rng(positions).integers(0, 9, (positions, 3, 2)).astype(np.uint8)
    return dataclasses.replace(one, routes=routes)


def made(route):
    spoken = episode("a", tokens=(4, 5, 6, 7), written=(True, False, True, True), finish="length")
    several = [spoken, episode("Ω <think>", prompt=(9, 8, 7), tokens=(1,)), episode(tokens=(1, 2))]
    first = scored([1, 0.25, -1], problem=Problem("q", "a", "t", "f", "7", "s"), episodes=[route(e) for e in several])
    return [first, scored([0, 1], rewards=[0.5, 0.1], episodes=[route(episode()), route(episode("x"))])]


@pytest.mark.parametrize("route", [routed, lambda one: one])
def test_to_the_bit(route):
    for groups in (made(route), []):
        found = from_arrays(to_arrays(groups))
        assert len(found) == len(groups)
        for got, want in zip(found, groups):
            assert got.group.problem == want.group.problem
            for name in ("raw", "rewards", "correct"):
                np.testing.assert_array_equal(getattr(got, name), getattr(want, name), strict=True)
            assert got.parts.keys() == want.parts.keys()
            for name in want.parts:
                np.testing.assert_array_equal(got.parts[name], want.parts[name], strict=True)
            for a, b in zip(got.group.episodes, want.group.episodes, strict=True):
                assert (a.turns, a.finish) == (b.turns, b.finish)
                for name in ("prompt", "tokens", "written", "logp", "version", "routes"):
                    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
