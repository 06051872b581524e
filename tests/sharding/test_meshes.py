"""The model on eight devices gives what it gives on one: loss, every gradient, generated tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax import sharding
from m1jax.inference.generate import decode

MESHES = [
    "data=8",
    "fsdp=8",
    "tensor=4,data=2",
    "expert=4,fsdp=2",
    "sequence=4,tensor=2",
    "fsdp=2,expert=2,tensor=2",
    "sequence=2,expert=2,tensor=2",
]
slow = pytest.mark.slow


def relative_errors(got, want):
    """Name of each parameter -> norm of the difference over the norm."""
    return {
        jax.tree_util.keystr(path): float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want))
    }


def compiled_gradient(problem, mesh):
    placed = sharding.parameter_shardings(problem.params, mesh)
    params = jax.device_put(problem.params, placed)
    batch = jax.device_put(problem.batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(problem.loss_fn), out_shardings=(None, placed))
        return step.lower(params, batch).compile(), params, batch


def check_gradients(problem, spec):
    step, params, batch = compiled_gradient(problem, sharding.make_mesh(spec))
    loss, grads = step(params, batch)
    np.testing.assert_allclose(loss, problem.loss, rtol=1e-5)
    errors = relative_errors(grads, problem.grads)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("spec", MESHES[4:6])
def test_gradients(small, spec):
    check_gradients(small, spec)


@slow
@pytest.mark.parametrize("spec", MESHES)
def test_gradients_of_several_periods(deep, spec):
    check_gradients(deep, spec)


def generated(problem, params, temperature):
    tokens = problem.batch["tokens"][:, :6]
    lengths = np.array([6, 3, 5, 1, 6, 2, 4, 6], np.int32)
    keys = jax.random.split(jax.random.key(1), len(tokens))
    out = decode(
        problem.graph,
        params,
        jnp.where(np.arange(6) < lengths[:, None], tokens, 0),
        lengths,
        keys,
        jnp.array([-1]),
        temperature,
        max_new_tokens=6,
    )
    return jax.tree.map(np.asarray, out)


def check_tokens(problem, spec):
    mesh = sharding.make_mesh(spec)
    params = jax.device_put(problem.params, sharding.parameter_shardings(problem.params, mesh))
    for temperature in (0.0, 1.0):
        want = generated(problem, problem.params, temperature)
        with jax.set_mesh(mesh):
            got = generated(problem, params, temperature)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)


def test_generated_tokens(small):
    check_tokens(small, "fsdp=2,expert=2,tensor=2")


@slow
@pytest.mark.parametrize("spec", MESHES)
def test_generated_tokens_of_several_periods(deep, spec):
    check_tokens(deep, spec)


@slow
def test_a_batch_too_small_for_the_mesh(deep):
    """Rows that cannot be shared out are computed by all; gradients must not be counted more than once."""
    step = jax.jit(jax.value_and_grad(deep.loss_fn))
    batch = {name: value[:2] for name, value in deep.batch.items()}
    loss, grads = step(deep.params, batch)
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        got_loss, got = step(jax.device_put(deep.params, sharding.parameter_shardings(deep.params, mesh)), batch)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    assert max(relative_errors(got, grads).values()) <= 1e-5
