"""The model under test, how it samples and how it is started; all of it can be vmapped over models."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from experiments.cispo_vs_rivals import tasks
from m1jax.config import ModelConfig
from m1jax.model import MiniMaxM1, Output, head
from pallas_kernels.ladder import Ladder

CONFIG = ModelConfig(
    vocab_size=tasks.VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    layer_types=("lightning", "softmax") * 2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rotary_dim=16,
    rope_theta=100.0,
    num_experts=4,
    experts_per_token=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    lightning_alpha=8**0.25,  # (2 L)^(1/4) at L = 4 layers, as M1's is at 80
    softmax_alpha=8**0.25,
    mlp_alpha=8**0.25,
)
START_STEPS, START_BATCH, START_RATE = 4000, 256, 4e-3
Params = nnx.State


def fresh(key: Array) -> Params:
    """Parameters drawn at random."""
    return nnx.split(MiniMaxM1(CONFIG, rngs=nnx.Rngs(params=key), dtype=jnp.float32))[1]


def model_of(params: Params) -> MiniMaxM1:
    """The model; a small one layer by layer, as a scan's copies would cost more than its layers."""
    model = nnx.merge(_graph(), params)
    return model.unstacked() if CONFIG.num_layers <= 4 else model


@functools.cache
def _graph() -> nnx.GraphDef[MiniMaxM1]:
    return nnx.graphdef(nnx.eval_shape(lambda: MiniMaxM1(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)))


def sample(
    params: Params, prompts: Int[Array, "rows prompt"], key: Array
) -> tuple[Int[Array, "rows response"], Float[Array, "rows response"], Integer[Array, "rows time layers k"]]:
    """Responses at temperature 1, the log-probability of each token, and the experts of every token but the last.

    What follows END is no part of a response; it is NOTHING, so that the trainer reads what the sampler read.
    """
    model = model_of(params)

    def choose(hidden: Array, ended: Array, key: Array) -> tuple[Array, Array]:
        logp = jax.nn.log_softmax(head.logits(hidden[:, -1], model.lm_head[...]))
        token = jnp.where(ended, tasks.NOTHING, jax.random.categorical(key, logp)).astype(jnp.int32)
        return token, jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]

    def step(carry: Any, key: Array) -> Any:
        token, cache, ended = carry
        ended = ended | (token == tasks.END)
        out = model.forward(token[:, None], cache, record_routes=True)
        new, logp = choose(out.hidden, ended, key)
        return (new, out.cache, ended), (new, logp, recorded(out)[:, 0])

    keys = jax.random.split(key, tasks.RESPONSE)
    cache = model.init_cache(len(prompts), tasks.PROMPT + tasks.RESPONSE)
    read = model.forward(prompts, cache, record_routes=True)
    ended = jnp.zeros(len(prompts), bool)
    token, logp = choose(read.hidden, ended, keys[0])
    _, (tokens, logps, routes) = jax.lax.scan(step, (token, read.cache, ended), keys[1:])
    routes = jnp.concatenate([recorded(read), jnp.moveaxis(routes, 0, 1)], axis=1)
    return jnp.concatenate([token[None], tokens]).T, jnp.concatenate([logp[None], logps]).T, routes


def recorded(out: Output) -> Integer[Array, "rows time layers k"]:
    """The experts that a forward pass was asked to record."""
    assert out.routes is not None
    return out.routes


def log_probs(
    params: Params, tokens: Int[Array, "rows time"], routes: Integer[Array, "rows time-1 layers k"] | None = None
) -> tuple[Float[Array, "rows response"], Float[Array, "rows response"]]:
    """The trainer's log-probability of each response token, and the entropy there."""
    model = model_of(params)
    hidden = model.forward(tokens[:, :-1], routes=routes).hidden[:, tasks.PROMPT - 1 :]
    return model.log_probs(hidden, tokens[:, tasks.PROMPT :])


def start(key: Array, steps: int = START_STEPS) -> Params:
    """Fresh parameters trained on demonstrations of all tasks; the rate falls linearly to zero."""
    key, key_fresh = jax.random.split(key)
    params = fresh(key_fresh)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.schedules.linear_schedule(START_RATE, 0.0, steps), b1=0.9, b2=0.95),
    )

    def loss(params: Params, key: Array) -> Array:
        key_task, key_each = jax.random.split(key)
        task = jax.random.randint(key_task, (START_BATCH,), 0, len(tasks.TASKS))
        tokens, weight = jax.vmap(tasks.demonstration)(jax.random.split(key_each, START_BATCH), task)
        return -jnp.sum(weight * log_probs(params, tokens)[0]) / jnp.sum(weight)

    def step(carry: Any, key: Array) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
    return params


@contextlib.contextmanager
def of(config: ModelConfig) -> Iterator[None]:
    """Another model under test."""
    with mock.patch.object(sys.modules[__name__], "CONFIG", config):
        _graph.cache_clear()
        yield
    _graph.cache_clear()


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Operations in the form that many models of this size can be vmapped in, in float32 products.

    Experts are computed densely: sorting tokens by expert, model by model, would cost more than they do.
    """

    def choose(self: Ladder, implementation: str, *arguments: object) -> str:
        return "reference" if self.op == "expert_mlp" else self.portable

    with mock.patch.object(Ladder, "choose", choose), jax.default_matmul_precision("highest"):
        yield
