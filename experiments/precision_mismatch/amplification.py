"""How a rounding error in the weights grows on its way to the logits, layer by layer.

The layers are the model's own blocks; what is written here again is how they are put together, so that alpha and beta,
the place of the norm and the routes can be changed.
"""

import dataclasses
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m1jax.config import LIGHTNING, M1_ALPHA, SOFTMAX, ModelConfig
from m1jax.model import MiniMaxM1, head
from m1jax.model.layers import Call, Place, rms_norm
from m1jax.model.lightning import log_decays

Unit = Literal["float32", "bfloat16"]
HIDDEN, BATCH, TIME, VOCABULARY = 64, 2, 128, 256


class Setting(NamedTuple):
    """What is varied; the first values are M1's at sixteen layers."""

    depth: int = 16
    kinds: str = "hybrid"
    experts: int = 4
    alpha: float = M1_ALPHA
    beta: float = 1.0
    norm: str = "post"
    replay: bool = False
    """the moved model takes the experts that the other one chose"""


class Found(NamedTuple):
    residual: list[float]
    """relative change after every layer"""
    logits: float
    logits_max: float
    """largest absolute change"""
    flipped: float
    """share of (token, layer) whose set of experts changed"""


def settings() -> dict[str, Setting]:
    """By name; the depths, then what is changed at sixteen layers."""
    base = Setting()
    found = {f"depth {n}": base._replace(depth=n) for n in (2, 4, 8, 16, 32)}
    found |= {f"depth {n}, routes replayed": base._replace(depth=n, replay=True) for n in (2, 4, 8, 16, 32)}
    found |= {
        "alpha of the depth, (2 L)^(1/4)": base._replace(alpha=(2 * base.depth) ** 0.25),
        "alpha 1, beta 1": base._replace(alpha=1.0),
        "alpha 7.1, beta 1": base._replace(alpha=2 * M1_ALPHA),
        "all lightning": base._replace(kinds=LIGHTNING),
        "all softmax": base._replace(kinds=SOFTMAX),
        "one expert": base._replace(experts=1),
        "16 experts": base._replace(experts=16),
        "16 experts, routes replayed": base._replace(experts=16, replay=True),
        "32 experts": base._replace(experts=32),
        "32 experts, routes replayed": base._replace(experts=32, replay=True),
        "pre-norm": base._replace(norm="pre", alpha=1.0),
        "pre-norm, routes replayed": base._replace(norm="pre", alpha=1.0, replay=True),
    }
    return found


def config(setting: Setting) -> ModelConfig:
    hybrid = tuple(SOFTMAX if layer % 8 == 7 else LIGHTNING for layer in range(setting.depth))
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        layer_types=hybrid if setting.kinds == "hybrid" else (setting.kinds,) * setting.depth,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rotary_dim=8,
        num_experts=setting.experts,
        experts_per_token=min(2, setting.experts),
        initializer_range=HIDDEN**-0.5,  # what a layer adds is then of the size of what it gets
    )


def measure(setting: Setting, seed: int, unit: Unit) -> Found:
    """One model drawn at random, and the same with its weights moved."""
    model = MiniMaxM1(config(setting), rngs=nnx.Rngs(seed), dtype=jnp.float32)
    tokens = jax.random.randint(jax.random.key(seed + 2000), (BATCH, TIME), 0, VOCABULARY)
    return compare(model, tokens, setting, seed, unit)


def compare(
    model: MiniMaxM1, tokens: Int[Array, "batch time"], setting: Setting, seed: int, unit: Unit, part: str = ""
) -> Found:
    """A model, and the same with those weights moved whose path has `part` in it."""
    graph, weights = nnx.split(model)
    moved = nnx.merge(graph, half_an_ulp(weights, unit, seed, part))
    streams, logits, routes = through(model, tokens, setting, None)
    moved_streams, moved_logits, moved_routes = through(moved, tokens, setting, routes if setting.replay else None)
    flips = [np.any(np.sort(a, axis=-1) != np.sort(b, axis=-1), axis=-1) for a, b in zip(routes, moved_routes)]
    return Found(
        residual=[_relative(a, b) for a, b in zip(streams, moved_streams)],
        logits=_relative(logits, moved_logits),
        logits_max=float(np.max(np.abs(logits - moved_logits))),
        flipped=float(np.mean(flips)),
    )


def half_an_ulp(weights: Any, unit: Unit, seed: int, part: str = "") -> Any:
    """Half of the weights (of those whose path has `part` in it) moved by one unit in the last place, up or down: half
    a unit each, on average. A bfloat16's unit is 2^16 times a float32's."""
    rng = np.random.default_rng(seed)

    def one(path: Any, w: Array) -> Array:
        value = np.asarray(w)
        if part not in jax.tree_util.keystr(path):
            return w
        step = np.spacing(np.abs(value)) * (1 if unit == "float32" else 2.0**16)
        moved = value + rng.choice([-1, 0, 0, 1], value.shape) * step
        return jnp.asarray(moved.astype(np.float32))

    return jax.tree_util.tree_map_with_path(one, weights)


def through(
    model: MiniMaxM1, tokens: Int[Array, "batch time"], setting: Setting, routes: list[np.ndarray] | None
) -> tuple[list[np.ndarray], Float[np.ndarray, "batch time vocab"], list[np.ndarray]]:
    """The residual stream after every layer, logits, and the experts of every layer."""
    made = model.config
    # Cut on the host, where that compiles nothing.
    unstacked = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, model).unstacked())
    call = Call(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
    decays = log_decays(made)
    blocks: Any = unstacked.runs
    numbers = [itertools.count() for _ in made.runs]
    h = jnp.take(model.embed_tokens[...], tokens, axis=0)
    streams, chosen = [], []
    for layer in range(made.num_layers):
        run = next(n for n, r in enumerate(made.runs) if r.start <= layer % made.period < r.start + r.count)
        block = blocks[run][next(numbers[run])]
        place = Place(0, jnp.asarray(decays[layer]))
        x = rms_norm(h, block.input_layernorm[...], block.eps)
        out, _ = block.attention(x, call, place, None)
        h = setting.alpha * (x if setting.norm == "post" else h) + setting.beta * out
        y = rms_norm(h, block.post_attention_layernorm[...], block.eps)
        out, routing = block.moe(y, None, None if routes is None else jnp.asarray(routes[layer]))
        h = setting.alpha * (y if setting.norm == "post" else h) + setting.beta * out
        streams.append(np.asarray(h))
        chosen.append(np.asarray(routing.experts))
    hidden = rms_norm(h, model.norm[...], made.rms_norm_eps)
    return streams, np.asarray(head.logits(hidden, model.lm_head[...])), chosen


def slope(by_depth: dict[int, float]) -> float:
    """Of log(change) over log(depth)."""
    depths = np.log(list(by_depth))
    return float(np.polyfit(depths, np.log(list(by_depth.values())), 1)[0])


def same_as_the_model(setting: Setting, seed: int) -> float:
    """Largest difference between `through` and the model itself, with M1's alpha and beta."""
    made = dataclasses.replace(config(setting))
    model = MiniMaxM1(made, rngs=nnx.Rngs(seed), dtype=jnp.float32)
    tokens = jax.random.randint(jax.random.key(seed), (BATCH, TIME), 0, VOCABULARY)
    return float(np.max(np.abs(through(model, tokens, setting, None)[1] - np.asarray(model(tokens)))))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm((a - b).astype(np.float64)) / np.linalg.norm(a.astype(np.float64)))
