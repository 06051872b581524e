import functools

import jax
import jax.numpy as jnp

from m1jax import compiling
from m1jax.sharding import parse_mesh


def test_xla_knows_the_options():
    """A name that a version of XLA has dropped is an error, on any platform."""
    options = compiling.GPU_OPTIONS | compiling.EXCHANGE_OPTIONS
    assert jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)(0.0) == 0


def test_only_on_a_gpu(monkeypatch):
    assert compiling.compiler_options() is None
    monkeypatch.setattr(compiling, "target_platform", lambda: "gpu")
    assert compiling.compiler_options() == compiling.GPU_OPTIONS


def test_what_an_update_asks_for(monkeypatch):
    def options(platform, spec):
        sizes = parse_mesh(spec)
        monkeypatch.setattr(compiling, "target_platform", lambda: platform)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))):
            return compiling.update_options()

    alone, usual = compiling.GPU_OPTIONS | compiling.EXCHANGE_OPTIONS, compiling.GPU_OPTIONS
    meshes = ("expert=2", "expert=2,tensor=2", "fsdp=2", "fsdp=2,expert=2")
    assert [options("gpu", spec) for spec in meshes] == [alone, alone, usual, usual]
    assert compiling.update_options() == usual
    meshes = ("fsdp=8", "expert=4,tensor=2", "data=2,fsdp=4", "fsdp=4,sequence=2", "tensor=8")
    kept = compiling.TPU_OPTIONS
    assert [options("tpu", spec) for spec in meshes] == [kept, kept, None, None, None]
    assert options("cpu", "fsdp=8") is None


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
