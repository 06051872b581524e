"""A process that is alone gets its own values back. Several are tested in tests/multihost."""

import jax.numpy as jnp
import numpy as np
import pytest

from m1jax import processes
from m1jax.errors import UserError


def test_alone():
    assert processes.writes()
    np.testing.assert_array_equal(processes.gathered(np.arange(3)), [[0, 1, 2]])
    assert processes.from_first([3, 1, 2]) == [3, 1, 2]
    assert processes.any_of(True)
    assert not processes.any_of(False)
    found = processes.on_host({"x": jnp.arange(3)})
    assert isinstance(found["x"], np.ndarray)
    np.testing.assert_array_equal(processes.own_rows(jnp.arange(3)), [0, 1, 2])


def test_an_error_is_raised_where_it_is():
    processes.raise_together(None, "elsewhere")
    with pytest.raises(UserError, match="here"):
        processes.raise_together(UserError("here"), "elsewhere")
