"""The sampler's probabilities of what it wrote against the trainer's, everything in bfloat16 but what an arm says."""

import functools
import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from experiments.cispo_vs_rivals.policy import recorded
from m1jax.config import ModelConfig
from m1jax.model import Cache, MiniMaxM1, head
from m1jax.model.cache import LightningCache

Bits = Literal["bfloat16", "float32"]


class Arm(NamedTuple):
    head: Bits
    state: Bits
    replay: bool

    def __str__(self) -> str:
        return f"head {self.head}, states {self.state}, routes {'replayed' if self.replay else 'free'}"


ARMS = tuple(Arm(*arm) for arm in itertools.product(("bfloat16", "float32"), ("bfloat16", "float32"), (False, True)))


class Scale(NamedTuple):
    """How large: by what the platform can do."""

    config: ModelConfig
    steps: int
    rows: int
    length: int
    """of training rows and of samples, in bytes"""


def scale() -> Scale:
    if jax.default_backend() == "cpu":
        return Scale(ModelConfig.preset("m1-tiny"), 300, 8, 128)
    return Scale(ModelConfig.preset("m1-100m"), 600, 16, 512)


PROMPT = 16
RATE = 1e-3


def corpus(root: Path) -> Int[np.ndarray, " bytes"]:
    """The package's own text."""
    files = sorted([*root.glob("m1jax/**/*.py"), *root.glob("docs/*.md")])
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8).astype(np.int32)


def trained(size: Scale, text: Int[np.ndarray, " bytes"], seed: int) -> tuple[nnx.State, float]:
    """Parameters after some language modelling in the platform's compute dtype, and the last loss in nats a byte."""
    graph, params = nnx.split(MiniMaxM1(size.config, rngs=nnx.Rngs(seed)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE, b1=0.9, b2=0.95, eps=1e-15))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: nnx.State, state: Any, tokens: Array) -> Any:
        def loss(params: nnx.State) -> Array:
            model = nnx.merge(graph, params)
            return -jnp.mean(model.log_probs(model.forward(tokens[:, :-1]).hidden, tokens[:, 1:])[0])

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    rng, state, value = np.random.default_rng(seed), optimizer.init(params), jnp.zeros(())
    for _ in range(size.steps):
        params, state, value = step(params, state, rows(text, size, rng))
    return params, float(value)


def rows(text: Int[np.ndarray, " bytes"], size: Scale, rng: np.random.Generator) -> Int[np.ndarray, "rows time"]:
    starts = rng.integers(0, len(text) - size.length - 1, size.rows)
    return np.stack([text[s : s + size.length + 1] for s in starts])


def in_bfloat16(size: Scale, params: nnx.State) -> MiniMaxM1:
    """The model that computes in bfloat16 wherever it is."""
    graph = nnx.graphdef(MiniMaxM1(size.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    return nnx.merge(graph, params)


@functools.partial(jax.jit, static_argnames=("length", "head_bits", "state_bits"))
def sample(
    model: MiniMaxM1, prompts: Int[Array, "rows prompt"], key: Array, *, length: int, head_bits: Bits, state_bits: Bits
) -> tuple[Int[Array, "rows time"], Float[Array, "rows new"], Integer[Array, "rows time-1 layers k"]]:
    """What the sampler writes after the prompts, with its log-probabilities and the experts it chose."""

    def choose(hidden: Array, key: Array) -> tuple[Array, Array]:
        logp = jax.nn.log_softmax(scores(hidden[:, -1], model, head_bits))
        token = jax.random.categorical(key, logp).astype(jnp.int32)
        return token, jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]

    def step(carry: Any, key: Array) -> Any:
        token, cache = carry
        out = model.forward(token[:, None], cache, record_routes=True)
        new, logp = choose(out.hidden, key)
        return (new, rounded(out.cache, state_bits)), (new, logp, recorded(out)[:, 0])

    keys = jax.random.split(key, length - prompts.shape[1])
    out = model.forward(prompts, model.init_cache(len(prompts), length), record_routes=True)
    token, logp = choose(out.hidden, keys[0])
    _, (tokens, logps, routes) = jax.lax.scan(step, (token, rounded(out.cache, state_bits)), keys[1:])
    return (
        jnp.concatenate([prompts, token[:, None], tokens.T], axis=1),
        jnp.concatenate([logp[None], logps]).T,
        jnp.concatenate([recorded(out), jnp.moveaxis(routes, 0, 1)], axis=1),
    )


@functools.partial(jax.jit, static_argnames=("new", "head_bits"))
def score(
    model: MiniMaxM1,
    tokens: Int[Array, "rows time"],
    routes: Integer[Array, "rows time-1 layers k"] | None,
    *,
    new: int,
    head_bits: Bits,
) -> Float[Array, "rows new"]:
    """The trainer's log-probabilities of the last `new` tokens, from one pass over the whole."""
    hidden = model.forward(tokens[:, :-1], routes=routes).hidden[:, -new:]
    logp = jax.nn.log_softmax(scores(hidden, model, head_bits))
    return jnp.take_along_axis(logp, tokens[:, -new:, None], axis=2)[..., 0]


def scores(hidden: Float[Array, "... hidden"], model: MiniMaxM1, bits: Bits) -> Float[Array, "... vocab"]:
    """Logits by the model's float32 head, or by a product of bfloat16 that is rounded to bfloat16."""
    if bits == "float32":
        return head.logits(hidden, model.lm_head[...])
    product = jnp.einsum("...i,vi->...v", hidden.astype(jnp.bfloat16), model.lm_head[...].astype(jnp.bfloat16))
    return product.astype(jnp.bfloat16).astype(jnp.float32)


def rounded(cache: Cache | None, bits: Bits) -> Cache:
    """The cache with its lightning states rounded."""
    assert cache is not None
    if bits == "float32":
        return cache
    runs = (
        LightningCache(run.state.astype(jnp.bfloat16).astype(jnp.float32)) if isinstance(run, LightningCache) else run
        for run in cache.runs
    )
    return cache._replace(runs=tuple(runs))


class Gap(NamedTuple):
    correlation: float
    """Pearson's, of the probabilities of the sampled tokens"""
    mean: float
    """|log-probability of the trainer - of the sampler|"""
    largest: float


def compare(sampler: Float[np.ndarray, "..."], trainer: Float[np.ndarray, "..."]) -> Gap:
    gap = np.abs(trainer - sampler)
    correlation = np.corrcoef(np.exp(sampler).ravel(), np.exp(trainer).ravel())[0, 1]
    return Gap(float(correlation), float(gap.mean()), float(gap.max()))


def measure(size: Scale, params: nnx.State, text: np.ndarray, seed: int) -> dict[Arm, tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of sampler and trainer, for every arm."""
    model = in_bfloat16(size, params)
    prompts = rows(text, size, np.random.default_rng(seed + 500))[:, :PROMPT]
    found = {}
    for arm in ARMS:
        how = dict(length=size.length, head_bits=arm.head, state_bits=arm.state)
        tokens, sampler, routes = sample(model, prompts, jax.random.key(seed), **how)  # pyright: ignore[reportArgumentType]
        replayed = routes if arm.replay else None
        trainer = score(model, tokens, replayed, new=size.length - PROMPT, head_bits=arm.head)
        found[arm] = (np.asarray(sampler), np.asarray(trainer))
    return found
