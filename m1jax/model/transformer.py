"""MiniMax-M1 (arXiv 2506.13585): block -> period of seven lightning layers and one softmax layer -> model.

    x = norm(h);  h = alpha * x + beta * attention(x)     # post-norm: the residual is the normed input
    y = norm(h);  h = alpha * y + beta * experts(y)

The stack is a scan over periods, so compile time does not grow with depth: every parameter of a layer has the periods
as its leading axis, and layer ``i * period + j`` is slice ``i`` of ``layers[j]``.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m1jax.config import LIGHTNING, ModelConfig
from m1jax.errors import UserError
from m1jax.model import head, parallel
from m1jax.model.cache import Cache, LightningCache, SoftmaxCache
from m1jax.model.layers import init_normal, rms_norm
from m1jax.model.lightning import LightningAttention, log_decays
from m1jax.model.moe import MoE, balancing_loss
from m1jax.model.softmax import SoftmaxAttention
from m1jax.sharding import constrain, gather_weights
from pallas_kernels import PADDING


class HiddenStates(NamedTuple):
    """What the stack returns before the head.

    ``hidden`` [batch, time, hidden] is normed, in the compute dtype. ``cache`` is the new one, or None where none was
    given. ``aux_loss`` [batch, time] float32 is the load-balancing loss of each token's sequence, the mean over layers,
    without its coefficient; None where a cache was given.
    """

    hidden: Float[Array, "batch time hidden"]
    cache: Cache | None
    aux_loss: Float[Array, "batch time"] | None


class Context(NamedTuple):
    """What every layer of one call shares."""

    positions: Int[Array, "batch time"]
    segment_ids: Int[Array, "batch time"] | None
    aux_over: Literal["sequence", "batch"] | None


class Block(nnx.Module):
    """One layer: attention of its kind, then experts, each with its norm and its pair (alpha, beta)."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.eps = config.rms_norm_eps
        self.mlp_scales = (config.mlp_alpha, config.mlp_beta)
        self.input_layernorm = nnx.Param(jnp.ones((config.num_periods, config.hidden_size), dtype))
        self.post_attention_layernorm = nnx.Param(jnp.ones((config.num_periods, config.hidden_size), dtype))
        if kind == LIGHTNING:
            self.attention_scales = (config.lightning_alpha, config.lightning_beta)
            self.attention = LightningAttention(config, rngs=rngs, dtype=dtype)
        else:
            self.attention_scales = (config.softmax_alpha, config.softmax_beta)
            self.attention = SoftmaxAttention(config, rngs=rngs, dtype=dtype)
        self.moe = MoE(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        h: Float[Array, "batch time hidden"],
        log_decay: Float[Array, " heads"],
        cache: LightningCache | SoftmaxCache | None,
        context: Context,
    ) -> tuple[Float[Array, "batch time hidden"], Any, Float[Array, "batch time"] | None]:
        """Returns the new residual stream, the layer's new cache, and its balancing loss per token."""
        x = rms_norm(h, self.input_layernorm[...], self.eps)
        if isinstance(self.attention, LightningAttention):
            assert cache is None or isinstance(cache, LightningCache)
            out, new_cache = self.attention(x, log_decay, cache, context.segment_ids)
        else:
            assert cache is None or isinstance(cache, SoftmaxCache)
            out, new_cache = self.attention(x, context.positions, cache, context.segment_ids)
        alpha, beta = self.attention_scales
        h = alpha * x + beta * out

        y = rms_norm(h, self.post_attention_layernorm[...], self.eps)
        out, routing = self.moe(y, context.segment_ids)
        alpha, beta = self.mlp_scales
        h = alpha * y + beta * out
        aux = None if context.aux_over is None else balancing_loss(routing, context.segment_ids, over=context.aux_over)
        return h, (None if cache is None else new_cache), aux


class MiniMaxM1(nnx.Module):
    """The language model.

    ``model(tokens) -> logits`` and ``model(tokens, cache) -> (logits, cache)`` are pure; wrap them in ``jax.jit`` or
    not, they compile once per shape either way.

    Args:
        config: the model's shape.
        rngs: draws the parameters, N(0, config.initializer_range^2).
        dtype: compute dtype; None takes float32 on CPU and bfloat16 on GPU and TPU. Slopes, states, routers, the
            insides of norms and softmaxes, and the head are float32 whatever it is.
        param_dtype: dtype of the parameters (routers stay float32).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        self.config = config
        self.dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        param_dtype = jnp.dtype(param_dtype)
        table, std = (config.vocab_size, config.hidden_size), config.initializer_range
        self.embed_tokens = init_normal(rngs, table, std, param_dtype)
        self.layers = nnx.List(
            Block(config, kind, rngs=rngs, dtype=param_dtype) for kind in config.layer_types[: config.period]
        )
        self.norm = nnx.Param(jnp.ones(config.hidden_size, param_dtype))
        self.lm_head = init_normal(rngs, table, std, param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
    ) -> Any:
        """Logits of the next token at every position, [batch, time, vocab] float32; with a cache ``(logits, cache)``.

        Args:
            tokens: [batch, time] ids.
            cache: what these rows have seen before (``init_cache``); the new one is returned.
            segment_ids: [batch, time], several sequences packed into a row, never going down; each is computed as
                if it stood alone. ``pallas_kernels.PADDING`` marks positions without a token. Not with a cache.
            lengths: [batch], how many tokens of each row are real, the rest being padding on the right.
            last_only: return the logits of each row's last real token only, [batch, vocab].

        Raises:
            UserError: shapes that do not fit, a token id outside the vocabulary, or more tokens than the cache has
                room for (values are checked where they are concrete, that is outside of jit).
        """
        out = self.hidden_states(tokens, cache, segment_ids=segment_ids, lengths=lengths)
        hidden = out.hidden
        if last_only:
            last = jnp.full(tokens.shape[0], tokens.shape[1] - 1) if lengths is None else jnp.maximum(lengths - 1, 0)
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        logits = head.logits(hidden, self.lm_head[...])
        return logits if cache is None else (logits, out.cache)

    def hidden_states(
        self,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        remat: bool = False,
        aux_loss_over: Literal["sequence", "batch"] = "sequence",
    ) -> HiddenStates:
        """Everything before the head; arguments as in ``__call__``.

        Args:
            remat: recompute each layer in the backward pass instead of keeping its activations.
            aux_loss_over: statistics of the balancing loss per sequence, or over the whole batch as Switch does.
        """
        self._check(tokens, cache, segment_ids, lengths)
        graph, parameters = nnx.split(self)
        return _hidden_states(graph, parameters, tokens, cache, segment_ids, lengths, remat, aux_loss_over)

    def log_probs(
        self,
        hidden: Float[Array, "batch time hidden"],
        targets: Int[Array, "batch time"],
        *,
        temperature: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
        """Log-probability of ``targets`` and entropy, [batch, time] float32, from ``hidden_states(...).hidden``."""
        return head.log_probs(hidden, self.lm_head[...], targets, temperature)

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for ``batch`` rows of up to ``max_length`` tokens."""
        return Cache.empty(self.config, batch, max_length, self.dtype)

    def _check(self, tokens: Any, cache: Cache | None, segment_ids: Any, lengths: Any) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(f"tokens must be integers [batch, time], not {tokens.dtype}{list(tokens.shape)}")
        if 0 in tokens.shape:
            raise UserError(f"tokens is empty: shape {list(tokens.shape)}; a call needs at least one token per row")
        if segment_ids is not None:
            if cache is not None or lengths is not None:
                raise UserError("segment_ids packs whole sequences: give neither a cache nor lengths with it")
            if segment_ids.shape != tokens.shape:
                raise UserError(f"segment_ids {list(segment_ids.shape)} must have tokens' shape {list(tokens.shape)}")
        for name, value in (("cache", None if cache is None else cache.lengths), ("lengths", lengths)):
            if value is not None and value.shape != tokens.shape[:1]:
                raise UserError(f"{name} is for {value.shape[0]} rows, tokens has {tokens.shape[0]}")
        if _concrete(tokens):
            low, high = np.asarray(tokens).min(), np.asarray(tokens).max()
            if low < 0 or high >= self.config.vocab_size:
                raise UserError(
                    f"token ids {low}..{high} are not all in the vocabulary 0..{self.config.vocab_size - 1}; "
                    "is this another model's tokenizer?"
                )
        if (
            lengths is not None
            and _concrete(lengths)
            and not np.all((np.asarray(lengths) >= 0) & (np.asarray(lengths) <= tokens.shape[1]))
        ):
            raise UserError(f"lengths must lie between 0 and tokens' time {tokens.shape[1]}, found {lengths}")
        if cache is not None and cache.max_length is not None and _concrete(cache.lengths):
            new = tokens.shape[1] if lengths is None or not _concrete(lengths) else np.asarray(lengths)
            if (needed := int(np.max(np.asarray(cache.lengths) + new))) > cache.max_length:
                raise UserError(
                    f"context overflow: {needed} tokens in a cache with room for {cache.max_length}; "
                    "make it larger with init_cache(batch, max_length)"
                )


def default_dtype() -> jnp.dtype:
    """The platform's compute dtype: bfloat16 on GPU and TPU, float32 on CPU (where bfloat16 is some 30x slower)."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _hidden_states(
    graph: Any,
    parameters: Any,
    tokens: jax.Array,
    cache: Cache | None,
    segment_ids: jax.Array | None,
    lengths: jax.Array | None,
    remat: bool,
    aux_over: Literal["sequence", "batch"],
) -> HiddenStates:
    model = nnx.merge(graph, parameters)
    config: ModelConfig = model.config
    steps = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if lengths is not None:
        segment_ids = jnp.where(steps < lengths[:, None], 0, PADDING)
    if cache is not None:
        positions = steps + cache.lengths[:, None]
    elif segment_ids is not None:
        starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
        positions = steps - jax.lax.cummax(jnp.where(starts, steps, 0), axis=1)
    else:
        positions = steps
    context = Context(positions, segment_ids, None if cache is not None else aux_over)

    block_graph, blocks = nnx.split(model.layers)
    decays = jnp.asarray(log_decays(config)).reshape(config.num_periods, config.period, config.num_heads)

    def run_block(block: Block, h: jax.Array, log_decay: jax.Array, cache: Any) -> tuple[jax.Array, Any, Any]:
        graph, parameters = nnx.split(block)
        block = nnx.merge(graph, gather_weights(parameters, model.dtype))
        h, cache, loss = block(h, log_decay, cache, context)
        return constrain(h, "batch", "residual", None), cache, loss

    def run_period(h: jax.Array, period: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        parameters, decays, caches = period
        new_caches, losses = [], []
        for j, block in enumerate(nnx.merge(block_graph, parameters)):
            run = _rematerialised(run_block) if remat else run_block
            h, new_cache, loss = run(block, h, decays[j], None if caches is None else caches[j])
            new_caches.append(new_cache)
            losses.append(loss)
        return h, (None if caches is None else tuple(new_caches), None if caches is not None else sum(losses))

    h = parallel.embed(model.embed_tokens[...], tokens, model.dtype)
    periods = (blocks, decays, None if cache is None else cache.layers)
    if config.num_periods == 1:  # nothing to scan: spare the loop's copies of parameters and caches
        h, outs = run_period(h, jax.tree.map(lambda x: x[0], periods))
        caches, losses = jax.tree.map(lambda x: x[None], outs)
    else:
        h, (caches, losses) = jax.lax.scan(run_period, h, periods)
    hidden = rms_norm(h, model.norm[...], config.rms_norm_eps)
    if cache is None:
        return HiddenStates(hidden, None, jnp.sum(losses, axis=0) / config.num_layers)
    new = tokens.shape[1] if lengths is None else lengths
    return HiddenStates(hidden, Cache(cache.lengths + new, caches), None)


def _rematerialised(run: Any) -> Any:
    def wrapped(block: Block, *arrays: Any) -> Any:
        graph, parameters = nnx.split(block)
        return jax.checkpoint(lambda p, *a: run(nnx.merge(graph, p), *a))(parameters, *arrays)

    return wrapped
