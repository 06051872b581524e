"""Several continuations of one prompt in training, the prompt computed once.

In every layer the prompt goes first; its lightning states are what the continuations begin with, its keys and values
what they attend to. Gradients of all continuations flow back into it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from m1jax.config import ModelConfig
from m1jax.model import parallel
from m1jax.model.cache import LightningCache, SoftmaxCache
from m1jax.model.checks import check_vocabulary
from m1jax.model.layers import Call, Place, rms_norm
from m1jax.model.lightning import LightningAttention
from m1jax.model.transformer import Block, MiniMaxM1, Remat, Seen, stack
from pallas_kernels import PADDING


class Side(NamedTuple):
    """Tokens of prompts, or of continuations."""

    tokens: Int[Array, "rows time"]
    lengths: Int[Array, " rows"]
    """how many of each row are real; the rest is padding on the right"""
    routes: UInt8[Array, "rows time layers k"] | None = None
    """experts to be taken, instead of the routers' own choice"""


def continuations(
    model: MiniMaxM1, prompts: Side, answers: Side, *, remat: Remat = "auto"
) -> Float[Array, "rows time hidden"]:
    """Normed hidden states of the continuations, as ``MiniMaxM1.forward`` has them of whole sequences.

    Args:
        model: the model.
        prompts: [P, S]; a prompt may be empty.
        answers: [P * G, T], G rows of one prompt side by side; T at least 2.
        remat: as in ``MiniMaxM1.forward``.
    """
    for side in (prompts, answers):
        check_vocabulary(model.config, side.tokens, "token ids")
    return _continuations(model, prompts, answers, remat)


@functools.partial(jax.jit, static_argnames="remat")
def _continuations(model: MiniMaxM1, prompts: Side, answers: Side, remat: Remat) -> jax.Array:
    times = len(answers.tokens) // len(prompts.tokens)
    room = prompts.tokens.shape[1] + answers.tokens.shape[1]
    calls = _call(prompts), _call(answers, jnp.repeat(prompts.lengths, times))

    def layer(block: Block, carry: Any, place: Place, replayed: Any, experts_of_run: bool) -> Any:
        (prompt, answer), _ = carry
        lightning = isinstance(block.attention, LightningAttention)
        memory = _fresh(model.config, lightning, len(prompts.tokens), room, prompt.dtype)
        here = place._replace(layer=0)  # the memory is this layer's alone
        prompt, memory, _ = block(prompt, memory, calls[0], here, replayed[0])
        memory = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), memory)
        answer, _, _ = block(answer, memory, calls[1], here, replayed[1])
        return ((prompt, answer), None), Seen(None, None)

    h = tuple(parallel.embed(model.embed_tokens[...], side.tokens, model.dtype) for side in (prompts, answers))
    nothing = (None,) * len(model.runs)
    (_, h), _, _ = stack(model, layer, h, nothing, (prompts.routes, answers.routes), remat)
    return rms_norm(h, model.norm[...], model.config.rms_norm_eps)


def _call(side: Side, start: Int[Array, " rows"] | None = None) -> Call:
    steps = jnp.broadcast_to(jnp.arange(side.tokens.shape[1], dtype=jnp.int32), side.tokens.shape)
    positions = steps if start is None else steps + start[:, None]
    return Call(positions, jnp.where(steps < side.lengths[:, None], 0, PADDING))


def _fresh(
    config: ModelConfig, lightning: bool, rows: int, room: int, dtype: jax.typing.DTypeLike
) -> LightningCache | SoftmaxCache:
    """The memory of one layer that has seen nothing."""
    if lightning:
        return LightningCache(jnp.zeros((1, rows, config.num_heads, config.head_dim, config.head_dim), jnp.float32))
    keys = jnp.zeros((1, rows, room, config.num_kv_heads, config.head_dim), dtype)
    return SoftmaxCache(keys, keys)
