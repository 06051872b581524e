"""The model on eight devices gives what it gives on one: loss, every gradient, generated tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from m1jax import sharding
from m1jax.inference import Engine, Request, Sampling
from m1jax.inference.memory import batch_capacity
from m1jax.inference.runner import ModelRunner

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


@pytest.mark.parametrize("spec", ["tensor=4,fsdp=2", "sequence=2,expert=2,tensor=2"])
def test_gradients_of_a_vocabulary_that_tensor_does_not_divide(prime, spec):
    check_gradients(prime, spec)


@slow
@pytest.mark.parametrize("spec", MESHES)
def test_gradients_of_several_periods(deep, spec):
    check_gradients(deep, spec)


def generated(problem, params):
    """Prompts of several lengths, greedy and not; more samples than a part of a mesh has rows."""
    tokens, lengths = problem.batch["tokens"], [6, 3, 5, 1, 6, 2, 4, 6]
    sizes = dict(prompts=8, samples=2, prompt_tokens=6, new_tokens=6)
    capacity = batch_capacity(problem.config, np.float32, **sizes)
    engine = Engine(ModelRunner(problem.graph, params, dataclasses.replace(capacity, rows=2, decode=(2,))))
    requests = [
        Request(row[:n], jax.random.key(i), Sampling(temperature=i % 2, top_p=1.0, max_new_tokens=6), samples=2)
        for i, (row, n) in enumerate(zip(tokens, lengths))
    ]
    return {(number, completion.sample): completion for number, completion in engine.run(requests)}


def check_tokens(problem, spec):
    mesh = sharding.make_mesh(spec)
    params = jax.device_put(problem.params, sharding.parameter_shardings(problem.params, mesh))
    want = generated(problem, problem.params)
    with jax.set_mesh(mesh):
        got = generated(problem, params)
    assert got.keys() == want.keys()
    for key, completion in got.items():
        np.testing.assert_array_equal(completion.tokens, want[key].tokens)
        np.testing.assert_allclose(completion.logp, want[key].logp, atol=1e-4)


def test_generated_tokens(small):
    check_tokens(small, "fsdp=2,expert=2,tensor=2")


def test_generated_tokens_of_a_vocabulary_that_tensor_does_not_divide(prime):
    check_tokens(prime, "tensor=4,data=2")


@slow
@pytest.mark.parametrize("spec", MESHES)
def test_generated_tokens_of_several_periods(deep, spec):
    check_tokens(deep, spec)


@slow
@pytest.mark.parametrize(("name", "time"), [("deep", 32), ("prime", 32), ("prime", 31)])
def test_a_batch_too_small_for_the_mesh(request, name, time):
    """What cannot be shared out is computed by all; gradients must not be counted more than once."""
    problem = request.getfixturevalue(name)
    step = jax.jit(jax.value_and_grad(problem.loss_fn))
    batch = {name: value[:2, :time] for name, value in problem.batch.items()}
    loss, grads = step(problem.params, batch)
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        got_loss, got = step(jax.device_put(problem.params, sharding.parameter_shardings(problem.params, mesh)), batch)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    assert max(relative_errors(got, grads).values()) <= 1e-5
