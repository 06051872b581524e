import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.experts import routing


@pytest.mark.parametrize("few", [0, 1024])
@pytest.mark.parametrize(("tokens", "experts", "block"), [(5, 3, 1), (40, 6, 8), (1, 2, 4)])
def test_plan(monkeypatch, tokens, experts, block, few):
    """Every assignment that counts has a row of its expert's, in the order of tokens, and the row knows its token."""
    monkeypatch.setattr(routing, "FEW", few)
    routes = np.random.default_rng(tokens).integers(-1, experts + 1, (tokens, 2))
    plan = routing.plan(jnp.asarray(routes, jnp.int32), experts, block)
    token, row, start, size = (np.asarray(a) for a in plan)
    np.testing.assert_array_equal(start, np.cumsum(size) - size)
    for e in range(experts):
        places = np.argwhere(routes == e)
        assert size[e] == -(-len(places) // block) * block
        np.testing.assert_array_equal(row[routes == e], start[e] + np.arange(len(places)))
        np.testing.assert_array_equal(token[start[e] : start[e] + len(places)], places[:, 0])
    assert (row[(routes < 0) | (routes >= experts)] == len(token)).all()
    assert np.sum(token < tokens) == np.sum((routes >= 0) & (routes < experts))
