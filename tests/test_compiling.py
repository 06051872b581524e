import functools

import jax
import jax.numpy as jnp

from m1jax import compiling


def test_xla_knows_the_options():
    """A name that a version of XLA has dropped is an error, on any platform."""
    assert jax.jit(jnp.sin).lower(1.0).compile(compiler_options=compiling.GPU_OPTIONS)(0.0) == 0


def test_only_on_a_gpu(monkeypatch):
    assert compiling.compiler_options() is None
    monkeypatch.setattr(compiling, "target_platform", lambda: "gpu")
    assert compiling.compiler_options() == compiling.GPU_OPTIONS


def test_jit():
    calls = []

    @functools.partial(compiling.jit, static_argnames="power")
    def raised(x, power):
        """To a power."""
        calls.append(power)
        return x**power

    assert raised(3.0, power=2) == 9 and raised(2.0, power=2) == 4
    assert calls == [2] and raised.__doc__ == "To a power."
    assert raised.lower(3.0, power=3).compile()(2.0) == 8
