"""The model's parts against direct formulas, and its training path: head, rematerialisation, one scan over periods."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig
from m1jax.model import head
from m1jax.model.layers import rotary
from m1jax.model.lightning import alibi_slopes, log_decays
from m1jax.model.moe import MoE, Routing, balancing_loss
from m1jax.weights.names import tensors
from pallas_kernels import PADDING
from tests.model.conftest import random_tokens, small_config, small_model

GOLDEN = Path(__file__).parents[1] / "golden"


def test_rope_equals_the_authors_up_to_ten_million():
    golden = np.load(GOLDEN / "rope.npz")
    positions = jnp.array(golden["positions"], jnp.int32)[None]
    x = jnp.zeros((1, positions.size, 1, 128)).at[..., :32].set(1.0).at[..., 64:].set(2.0)
    out = rotary(x, positions, rotary_dim=64, theta=1e7)[0, :, 0]
    np.testing.assert_allclose(out[:, :32], golden["cos"][:, :32], atol=1e-6)
    np.testing.assert_allclose(out[:, 32:64], golden["sin"][:, :32], atol=1e-6)
    np.testing.assert_array_equal(out[:, 64:], 2.0)


def test_slopes_are_alibis_for_any_head_count():
    np.testing.assert_allclose(alibi_slopes(4), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    np.testing.assert_allclose(alibi_slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    decays = log_decays(ModelConfig.preset("m1-456b"))
    assert decays.dtype == np.float32
    assert decays.shape == (80, 64)
    np.testing.assert_allclose(decays[0, 0], -(2.0**-0.125) * (1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(decays[79, 63], -(2.0**-8) * 1e-5, rtol=1e-6)
    assert np.all(log_decays(small_config("L")) < 0)  # a single layer has no depth to divide by


def test_log_probs_equal_those_of_the_full_logits(model, monkeypatch):
    tokens, targets = random_tokens(0, 2, 13), random_tokens(1, 2, 13)
    weight = jax.random.normal(jax.random.key(0), (2, 13))

    def chunked(lm_head, hidden):
        log_prob, entropy = head.log_probs(hidden, lm_head, targets, temperature=0.7)
        return jnp.sum(weight * (log_prob + 0.1 * entropy)), (log_prob, entropy)

    def full(lm_head, hidden):
        log_p = jax.nn.log_softmax(hidden @ lm_head.T / 0.7)
        log_prob = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return jnp.sum(weight * (log_prob + 0.1 * entropy)), (log_prob, entropy)

    hidden = model.forward(tokens).hidden
    monkeypatch.setattr("m1jax.model.head.CHUNK_ELEMENTS", 4 * 2 * 64)  # chunks of 4 in 13 steps
    ours = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(model.lm_head[...], hidden)
    theirs = jax.jit(jax.value_and_grad(full, argnums=(0, 1), has_aux=True))(model.lm_head[...], hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, theirs)


def test_log_probs_never_hold_all_logits():
    """The compiled program for 64k tokens x 200k words (52 GB of logits) works in under 2 GB."""
    shapes = [jax.ShapeDtypeStruct((1, 65_536, 24), jnp.float32), jax.ShapeDtypeStruct((200_064, 24), jnp.float32)]

    def loss(hidden, lm_head):
        return jnp.sum(head.log_probs(hidden, lm_head, jnp.zeros((1, 65_536), jnp.int32))[0])

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9


def test_the_program_does_not_grow_with_depth():
    def size(pattern: str) -> int:
        config = small_config(pattern)
        model = nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0)))
        graph, parameters = nnx.split(model)

        def loss(parameters, tokens):
            return jnp.sum(nnx.merge(graph, parameters).forward(tokens).hidden)

        lowered = jax.jit(jax.grad(loss)).lower(parameters, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        return len(lowered.as_text().splitlines())

    assert size("LS" * 40) <= 1.01 * size("LS" * 2)


@pytest.mark.parametrize("pattern", ["LLSLLS", "SLL"])
def test_a_scanned_stack_equals_its_layers_one_by_one(pattern):
    """Whatever the runs and periods: scans against a plain loop over the layers, outputs and gradients."""
    model, tokens = small_model(pattern), random_tokens(0, 2, 20)

    def loss(model):
        out = model.forward(tokens, record_routes=True)
        return jnp.sum(out.hidden**2) + jnp.sum(out.aux), out

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, scanned), gradients = both(model)
    (_, plain), expected = both(model.unstacked())
    np.testing.assert_allclose(scanned.hidden, plain.hidden, atol=1e-5)
    np.testing.assert_allclose(scanned.aux, plain.aux, rtol=1e-5)
    np.testing.assert_array_equal(scanned.routes, plain.routes)
    for run, layers in zip(gradients.runs, expected.runs):
        stacked = jax.tree.map(lambda *x: np.stack(x), *(nnx.state(layer) for layer in layers))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), nnx.state(run), stacked)


def test_layers_lie_in_their_runs_in_the_order_of_the_model():
    """Layer l of the official files is the layer that decays as number l, whatever run it belongs to."""
    config = small_config("LLSLLS")
    assert [tuple(run) for run in config.runs] == [("lightning", 0, 2), ("softmax", 2, 1)]
    places = {t.name: (t.path[1], t.index) for t in tensors(config) if t.index}
    assert [places[f"model.layers.{n}.input_layernorm.weight"] for n in range(6)] == [
        (0, (0,)), (0, (1,)), (1, (0,)), (0, (2,)), (0, (3,)), (1, (1,)),
    ]  # fmt: skip


class Packed:
    """Two rows of packed sequences, and what is learned from them."""

    def __init__(self):
        self.model, self.tokens = small_model("LSLS"), random_tokens(0, 2, 16)
        self.ids = jnp.array([[0] * 9 + [1] * 7, [0] * 12 + [PADDING] * 4])
        self.recorded = self.model.forward(self.tokens, segment_ids=self.ids, record_routes=True).routes

    @functools.cache  # noqa: B019
    def gradients(self, remat, replayed=False):
        """The loss and its gradients, by the routers' choice or with the recorded one."""

        def loss(model, routes):
            out = model.forward(self.tokens, segment_ids=self.ids, routes=routes, remat=remat)
            return jnp.sum(jnp.where(self.ids[..., None] == PADDING, 0.0, out.hidden) ** 2) + jnp.sum(out.aux)

        value, gradients = jax.jit(jax.value_and_grad(loss))(self.model, self.recorded if replayed else None)
        return value, nnx.state(gradients)


@pytest.fixture(scope="module")
def packed():
    return Packed()


@pytest.mark.parametrize("remat", ["cheap", "layers"])
def test_rematerialisation_changes_nothing(packed, remat):
    plain, recomputed = packed.gradients("none"), packed.gradients(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, recomputed)


@pytest.mark.parametrize("remat", ["none", "layers"])
def test_replayed_routes_give_the_same_output_and_gradients(packed, remat):
    assert packed.recorded.dtype == jnp.uint8
    assert packed.recorded.shape == (2, 16, 4, 2)
    assert np.all(packed.recorded[1, 12:] == packed.model.config.num_experts)  # padding is nobody's expert
    own, replayed = packed.gradients(remat), packed.gradients(remat, replayed=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), own[1], replayed[1])
    np.testing.assert_allclose(own[0], replayed[0], rtol=1e-6)


def test_other_routes_take_other_experts_with_their_own_weights():
    """Experts chosen elsewhere are used, weighted by today's probabilities; the router's gradient flows."""
    config = small_config()
    layer = moe_layer(config)
    x = jax.random.normal(jax.random.key(1), (1, 7, config.hidden_size))
    probabilities = layer.route(x).probabilities
    least = jnp.argsort(probabilities, axis=-1)[..., :2].astype(jnp.uint8)
    routing = layer.route(x, least)
    np.testing.assert_array_equal(routing.experts, least)
    chosen = jnp.take_along_axis(probabilities, least.astype(jnp.int32), axis=-1)
    np.testing.assert_allclose(routing.weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda x, layer: jnp.sum(layer(x, replayed=least)[0] ** 2), argnums=(0, 1)))
    of_x, of_layer = gradients(x, layer)
    assert jnp.all(jnp.isfinite(of_x))
    assert jnp.any(of_layer.gate[...] != 0)


def moe_layer(config: ModelConfig) -> MoE:
    return jax.tree.map(lambda x: x[0], MiniMaxM1(config, rngs=nnx.Rngs(0)).runs[0].moe)


def test_shared_expert_is_mixed_by_its_coefficient():
    config = small_config(shared_intermediate_size=16)
    layer = moe_layer(config)
    x = jax.random.normal(jax.random.key(1), (2, 5, config.hidden_size))
    assert layer.shared_mlp is not None
    assert layer.coefficient is not None
    shared, share = layer.shared_mlp(x), jax.nn.sigmoid(x @ layer.coefficient[...].T)
    whole = jax.jit(lambda layer: layer(x, None)[0])
    mixed = whole(layer)
    layer.shared_mlp = layer.coefficient = None
    routed = whole(layer)
    np.testing.assert_allclose(mixed, routed * (1 - share) + shared * share, atol=1e-5)


def test_experts_against_the_sum_over_all_of_them():
    config = small_config(experts_per_token=3)
    layer = moe_layer(config)
    x = jax.random.normal(jax.random.key(1), (1, 7, config.hidden_size))
    out, routing = jax.jit(lambda layer: layer(x, None))(layer)
    np.testing.assert_allclose(jnp.sum(routing.weights, axis=-1), 1.0, rtol=1e-6)
    every = jnp.einsum(
        "btef,edf->bted",
        jax.nn.silu(jnp.einsum("bti,efi->btef", x, layer.w1[...])) * jnp.einsum("bti,efi->btef", x, layer.w3[...]),
        layer.w2[...],
    )
    chosen = jnp.take_along_axis(every, routing.experts[..., None], axis=2)
    np.testing.assert_allclose(out, jnp.sum(chosen * routing.weights[..., None], axis=2), atol=1e-5)


def test_balancing_loss_is_switchs():
    probabilities = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 6, 4)))
    weights, experts = jax.lax.top_k(probabilities, 2)
    routing = Routing(probabilities, experts, weights)
    chosen = jax.nn.one_hot(experts, 4).sum(-2)
    by_hand = 4 * jnp.sum(chosen.mean((0, 1)) * probabilities.mean((0, 1)))
    np.testing.assert_allclose(balancing_loss(routing, None, over="batch"), jnp.full((2, 6), by_hand), rtol=1e-6)
    row = 4 * jnp.sum(chosen[1, :4].mean(0) * probabilities[1, :4].mean(0))
    ids = jnp.array([[0] * 6, [0] * 4 + [PADDING] * 2])
    np.testing.assert_allclose(balancing_loss(routing, ids)[1], [row] * 4 + [0, 0], rtol=1e-6)
    uniform = Routing(
        jnp.full((1, 4, 4), 0.25), jnp.array([[[0, 1], [2, 3], [0, 1], [2, 3]]]), jnp.full((1, 4, 2), 0.5)
    )
    np.testing.assert_allclose(balancing_loss(uniform, None), 2.0)


def test_bfloat16_compute_keeps_float32_where_m1_needs_it():
    model = small_model("LS")
    half = MiniMaxM1(model.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert half.runs[0].moe.gate.dtype == jnp.float32
    assert half.runs[0].moe.w1.dtype == jnp.bfloat16
    nnx.update(half, jax.tree.map(lambda ours, other: other.astype(ours.dtype), nnx.state(half), nnx.state(model)))
    tokens = random_tokens(0, 1, 12)
    logits, cache = half(tokens, half.init_cache(1, 12))
    assert logits.dtype == jnp.float32
    assert cache.runs[0].state.dtype == jnp.float32
    assert cache.runs[1].keys.dtype == jnp.bfloat16
    expected = model(tokens)
    assert jnp.linalg.norm(logits - expected) < 0.05 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("changes", [{"rotary_dim": 0}, {"rotary_dim": 16}, {"head_dim": 8, "rotary_dim": 4}])
def test_gradients_reach_every_parameter(changes):
    model = small_model("LS", shared_intermediate_size=8, **changes)
    graph, parameters = nnx.split(model)
    tokens = random_tokens(0, 4, 32)

    def loss(parameters):
        model = nnx.merge(graph, parameters)
        out = model.forward(tokens)
        return -jnp.mean(model.log_probs(out.hidden, tokens)[0]) + jnp.mean(out.aux)

    for path, gradient in jax.tree.leaves_with_path(jax.device_get(jax.jit(jax.grad(loss))(parameters))):
        assert np.isfinite(gradient).all(), jax.tree_util.keystr(path)
        assert np.any(gradient), jax.tree_util.keystr(path)
