"""What a GPU does differently where it decodes: weights stay in their stacks, and few layers are written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.inference.runner import prepared
from m1jax.model import transformer
from m1jax.sharding import make_mesh, parameter_shardings, parse_mesh
from tests.model.conftest import random_tokens, small_model


@pytest.mark.parametrize(
    ("batch", "few_layers", "changes"),
    [(5, 16, {}), (6, 3, {}), (7, 16, {"shared_intermediate_size": 16})],  # no batch twice: compiled programs are kept
)
def test_decodes_the_same(monkeypatch, batch, few_layers, changes):
    """As with all tokens at once; kernels, which ask for the platform themselves, take their portable forms."""
    model, tokens = small_model("LLSLLS", **changes), random_tokens(1, batch, 6)
    want = model(tokens)
    _, cache = model(tokens[:, :3], model.init_cache(batch, 8))
    cache = cache._replace(slots=jnp.arange(batch), pages=jnp.arange(batch)[:, None])
    monkeypatch.setattr(transformer, "FEW_LAYERS", few_layers)
    for name in ("transformer", "parallel"):
        monkeypatch.setattr(f"m1jax.model.{name}.target_platform", lambda: "gpu")
    for place in range(3, 6):
        logits, cache = model(tokens[:, place : place + 1], cache)
        np.testing.assert_allclose(logits[:, 0], want[:, place], atol=2e-5)


@pytest.mark.parametrize("spec", ["expert=2,tensor=2", "data=2,tensor=4"])
def test_decodes_the_same_on_a_mesh(monkeypatch, spec):
    """Every kernel for few tokens has its part of the rows, heads, experts and words."""
    model, tokens = small_model("LLS", num_heads=8, num_kv_heads=4), random_tokens(1, 8, 5)
    want = model(tokens)
    _, cache = model(tokens[:, :3], model.init_cache(8, 8))
    for name in ("transformer", "parallel"):
        monkeypatch.setattr(f"m1jax.model.{name}.target_platform", lambda: "gpu")
    mesh = make_mesh(spec, jax.devices()[: math.prod(parse_mesh(spec).values())])
    with jax.set_mesh(mesh):
        model = prepared(model)
        model = jax.device_put(model, parameter_shardings(model, mesh, whole=True))
        for place in range(3, 5):
            logits, cache = model(tokens[:, place : place + 1], cache)
            np.testing.assert_allclose(logits[:, 0], want[:, place], atol=2e-5)


def test_routes_are_replayed(monkeypatch):
    """A router's choice is then not asked for, and its gate is one layer's."""
    model, tokens = small_model("LLSLLS"), random_tokens(1, 8, 4)
    out = model.forward(tokens, record_routes=True)
    assert out.routes is not None
    _, cache = model(tokens[:, :3], model.init_cache(8, 8))
    monkeypatch.setattr(transformer, "target_platform", lambda: "gpu")
    one = model.forward(tokens[:, 3:], cache, routes=out.routes[:, 3:], record_routes=True)
    np.testing.assert_allclose(one.hidden[:, 0], out.hidden[:, 3], atol=2e-5)
