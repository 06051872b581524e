"""MiniMax-M1 (arXiv 2506.13585): block -> run of equal layers -> period of runs -> model.

    x = norm(h);  h = alpha * x + beta * attention(x)     # post-norm: the residual is the normed input
    y = norm(h);  h = alpha * y + beta * experts(y)

The stack is a loop over periods, and within a period over each run of equal layers, so that neither the program nor its
compile time grows with depth: every parameter of a run has its layers, over all periods, as the leading axis.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, UInt8

from m1jax import parameters
from m1jax.config import LIGHTNING, ModelConfig, Run
from m1jax.model import head, parallel
from m1jax.model.cache import Cache, LightningCache, SoftmaxCache
from m1jax.model.checks import check_forward, check_vocabulary
from m1jax.model.depth import over_layers
from m1jax.model.layers import Call, Place, Weights, rms_norm
from m1jax.model.lightning import LightningAttention, log_decays
from m1jax.model.moe import MoE, Routing, balancing_loss
from m1jax.model.softmax import SoftmaxAttention
from m1jax.sharding import ambient_mesh, constrain_residual, gather_weights
from pallas_kernels import PADDING, target_platform
from pallas_kernels.kept import KEPT

FEW_LAYERS = 16
"""So many are written out when a GPU decodes: between the turns of a loop it stands still for some microseconds, and a
vector that a kernel takes would be cut out of its stack by a kernel of its own."""

EXPERTS = ("w1", "w3", "w2")
FOR_FEW_TOKENS = ("gate", "qkv_proj", "output_gate", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
"""Parameters that kernels for a decode step read in their stacks, beside the experts."""

Remat = Literal["auto", "none", "cheap", "layers"]
AuxLossOver = Literal["sequence", "batch", "nothing"]


class Output(NamedTuple):
    """What the stack returns before the head.

    Attributes:
        hidden: normed, in the compute dtype.
        cache: the new one; None where none was given.
        routes: the experts of every token and layer, where they were to be recorded; ``num_experts`` for PADDING.
        aux: the load-balancing loss of each token's sequence, float32, the mean over layers, without its coefficient;
            None where a cache was given.
    """

    hidden: Float[Array, "batch time hidden"]
    cache: Cache | None
    routes: UInt8[Array, "batch time layers k"] | None
    aux: Float[Array, "batch time"] | None


class Seen(NamedTuple):
    """What a layer tells beside its output; both None where nobody asked."""

    routes: UInt8[Array, "*layers batch time k"] | None
    aux: Float[Array, "*layers batch time"] | None


class Experts(NamedTuple):
    """The experts of all layers of a run."""

    w1: Float[Array, "layers experts inner hidden"]
    w3: Float[Array, "layers experts inner hidden"]
    w2: Float[Array, "layers experts hidden inner"]


class Block(nnx.Module):
    """Attention of a kind, then experts, each with its norm and its pair (alpha, beta): the layers of one run.

    Every parameter is [layers, ...]; ``__call__`` is the forward pass of a block whose parameters are one layer's.
    """

    def __init__(self, config: ModelConfig, kind: str, weights: Weights) -> None:
        self.eps = config.rms_norm_eps
        self.mlp_scales = (config.mlp_alpha, config.mlp_beta)
        self.input_layernorm = nnx.Param(weights["input_layernorm",])
        self.post_attention_layernorm = nnx.Param(weights["post_attention_layernorm",])
        if kind == LIGHTNING:
            self.attention_scales = (config.lightning_alpha, config.lightning_beta)
            self.attention = LightningAttention(config, weights)
        else:
            self.attention_scales = (config.softmax_alpha, config.softmax_beta)
            self.attention = SoftmaxAttention(config, weights)
        self.moe = MoE(config, weights)

    def __call__(
        self,
        h: Float[Array, "batch time hidden"],
        memory: LightningCache | SoftmaxCache | None,
        call: Call,
        place: Place,
        replayed: Integer[Array, "batch time k"] | None = None,
        experts_of_run: bool | Experts | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], LightningCache | SoftmaxCache | None, Routing]:
        """The new residual stream, the run's memory with this layer's part renewed, and the routing.

        ``experts_of_run``: the experts' weights are those of the whole run, or those of the run beside the layer's own
        (see ``MoE.__call__``).
        """
        x = rms_norm(h, self.input_layernorm[...], self.eps)
        if isinstance(self.attention, LightningAttention):
            assert memory is None or isinstance(memory, LightningCache)
            out, memory = self.attention(x, call, place, memory)
        else:
            assert memory is None or isinstance(memory, SoftmaxCache)
            out, memory = self.attention(x, call, place, memory)
        alpha, beta = self.attention_scales
        h = alpha * x + beta * out

        y = rms_norm(h, self.post_attention_layernorm[...], self.eps)
        stacks = experts_of_run if isinstance(experts_of_run, Experts) else None
        out, routing = self.moe(y, call.segment_ids, replayed, place.layer if experts_of_run else None, stacks)
        alpha, beta = self.mlp_scales
        h = alpha * y + beta * out
        return constrain_residual(h), memory, routing


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
        self.whole = False
        """On a mesh: matrices that belong to no expert are cut over tensor alone. Else over fsdp and expert too, and
        gathered layer by layer when they are used: right for training, for each token of decoding too much."""
        draw = functools.partial(initial, rngs=rngs, std=config.initializer_range, dtype=jnp.dtype(param_dtype))
        embed_tokens, norm, lm_head = parameters.of_model(config)
        self.embed_tokens = nnx.Param(draw(embed_tokens))
        self.runs = nnx.List(Block(config, run.kind, draw_run(config, run, draw)) for run in config.runs)
        self.norm = nnx.Param(draw(norm))
        self.lm_head = nnx.Param(draw(lm_head))

    @overload
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        cache: None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
    ) -> Float[Array, "..."]: ...

    @overload
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        cache: Cache,
        *,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "..."], Cache]: ...

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
    ) -> Float[Array, "..."] | tuple[Float[Array, "..."], Cache]:
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
        out = self.forward(tokens, cache, segment_ids=segment_ids, lengths=lengths)
        hidden = out.hidden
        if last_only:
            last = jnp.full(tokens.shape[0], tokens.shape[1] - 1) if lengths is None else jnp.maximum(lengths - 1, 0)
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        logits = head.logits(hidden, self.lm_head[...])
        return logits if out.cache is None else (logits, out.cache)

    def forward(
        self,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        routes: Integer[Array, "batch time layers k"] | None = None,
        record_routes: bool = False,
        remat: Remat = "auto",
        aux_loss_over: AuxLossOver = "sequence",
    ) -> Output:
        """Everything before the head; arguments and errors as in ``__call__``.

        Args:
            routes: experts chosen before (``Output.routes``), taken instead of the routers' own choice.
            record_routes: return the choice of experts.
            remat: what the backward pass computes again instead of keeping it: nothing ("none"), all but the results of
                products and kernels ("cheap": on a GPU faster than "none", in a third of the memory), or everything
                inside a layer ("layers"). "auto" is "none" on CPU and "cheap" elsewhere.
            aux_loss_over: statistics of the balancing loss per sequence, or over the whole batch as Switch does; or no
                such loss ("nothing").
        """
        check_forward(self.config, tokens, cache, segment_ids, lengths, routes)
        return _forward(self, tokens, cache, segment_ids, lengths, routes, record_routes, remat, aux_loss_over)

    def log_probs(
        self,
        hidden: Float[Array, "batch time hidden"],
        targets: Int[Array, "batch time"],
        *,
        temperature: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
        """Log-probability of ``targets`` and entropy, [batch, time] float32, from ``forward(...).hidden``.

        Raises:
            UserError: a target outside the vocabulary (where values are concrete).
        """
        check_vocabulary(self.config, targets, "targets")
        return head.log_probs(hidden, self.lm_head[...], targets, temperature)

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for ``batch`` rows of up to ``max_length`` tokens."""
        return Cache.empty(self.config, batch, max_length, self.dtype)

    def unstacked(self) -> MiniMaxM1:
        """The same model with every layer's weights in arrays of their own, a copy.

        For decoding on a CPU, where cutting a layer out of its stack would cost more than using it. The program then
        grows with depth.
        """
        model = jax.tree.map(lambda x: x, self)
        counts = (self.config.num_periods * run.count for run in self.config.runs)
        model.runs = nnx.List(
            nnx.List(jax.tree.map(lambda x, i=i: x[i], block) for i in range(count))
            for block, count in zip(self.runs, counts)
        )
        return model


def initial(
    parameter: parameters.Parameter, *copies: int, rngs: nnx.Rngs, std: float, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """``copies`` of a parameter as training begins with it: ones, or drawn from N(0, std^2)."""
    shape, dtype = (*copies, *parameter.shape), jnp.dtype(jnp.float32) if parameter.router else dtype
    if parameter.init == "ones":
        return jnp.ones(shape, dtype)
    return std * jax.random.normal(rngs.params(), shape, dtype)


def draw_run(config: ModelConfig, run: Run, draw: Callable[..., jax.Array]) -> Weights:
    """The parameters of a run's layers over all periods, [layers, ...]; layer n is the n-th that the model meets."""
    declared = parameters.of_block(config, run.kind)
    drawn = [[draw(parameter, config.num_periods) for parameter in declared] for _ in range(run.count)]
    stacked = (jnp.stack(arrays, axis=1) for arrays in zip(*drawn))
    return {p.path: x.reshape(-1, *p.shape) for p, x in zip(declared, stacked)}


def default_dtype() -> jnp.dtype:
    """The platform's compute dtype: bfloat16 on GPU and TPU, float32 on CPU (where bfloat16 is some 30x slower)."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _positions(segment_ids: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Of tokens in their segments."""
    steps = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return steps - jax.lax.cummax(jnp.where(starts, steps, 0), axis=1)


@functools.partial(jax.jit, static_argnames=("record_routes", "remat", "aux_over"))
def _forward(
    model: MiniMaxM1,
    tokens: jax.Array,
    cache: Cache | None,
    segment_ids: jax.Array | None,
    lengths: jax.Array | None,
    routes: jax.Array | None,
    record_routes: bool,
    remat: Remat,
    aux_over: AuxLossOver,
) -> Output:
    steps = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    new = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32) if lengths is None else lengths
    if cache is not None and cache.slots is not None:
        new = jnp.where(cache.slots < 0, 0, new)
    if segment_ids is None and (lengths is not None or (cache is not None and cache.slots is not None)):
        segment_ids = jnp.where(steps < new[:, None], 0, PADDING)

    if cache is not None:
        positions = steps + cache.lengths[:, None]
        call = Call(positions, segment_ids, cache.slots, cache.pages)
    elif segment_ids is not None:
        call = Call(parallel.with_all_of_time(_positions, segment_ids), segment_ids)
    else:
        call = Call(steps)

    h = parallel.embed(model.embed_tokens[...], tokens, model.dtype, model.whole)
    memories = (None,) * len(model.runs) if cache is None else cache.runs

    def layer(block: Block, carry: Any, call: Call, place: Place, replayed: Any, experts_of_run: Any) -> Any:
        h, memory = carry
        h, memory, routing = block(h, memory, call, place, replayed, experts_of_run)
        aux = None
        if cache is None and aux_over != "nothing":
            aux = balancing_loss(routing, call.segment_ids, over=aux_over)
        return (h, memory), Seen(routing.experts.astype(jnp.uint8) if record_routes else None, aux)

    h, memories, seen = stack(model, layer, h, call, memories, routes, remat)
    hidden = rms_norm(h, model.norm[...], model.config.rms_norm_eps)
    return Output(
        hidden,
        None if cache is None else cache._replace(lengths=cache.lengths + new, runs=memories),  # type: ignore[arg-type]
        None if seen.routes is None else jnp.moveaxis(seen.routes, 0, 2),
        None if seen.aux is None else jnp.mean(seen.aux, axis=0),
    )


Memory = LightningCache | SoftmaxCache | None


Layer = Callable[[Block, Any, Any, Place, Any, "bool | Experts | None"], tuple[Any, Seen]]
"""(block, (h, memory), call, place, its routes, the experts of the whole run: see Block) -> ((h, memory), seen)"""
H = TypeVar("H")


def stack(
    model: MiniMaxM1, layer: Layer, h: H, call: Any, memories: tuple[Memory, ...], routes: Any, remat: Remat
) -> tuple[H, tuple[Memory, ...], Seen]:
    """All layers: the residual stream, the memory of each run, and what was seen, [layers, ...].

    Args:
        model: whose.
        layer: computes one; it closes over no arrays.
        h: the residual stream, any pytree that ``layer`` knows.
        call: what ``layer`` is given as its call, a pytree.
        memories: of each run, or None.
        routes: arrays [batch, time, layers, k] to be replayed, a pytree, or None.
        remat: see ``MiniMaxM1.forward``.
    """
    config = model.config
    places = _by_run(config, Place(jnp.zeros(config.num_layers, jnp.int32), jnp.asarray(log_decays(config))))
    places = [x._replace(layer=jnp.arange(x.layer.size, dtype=jnp.int32).reshape(x.layer.shape)) for x in places]
    replayed = _by_run(config, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), routes))

    if isinstance(model.runs[0], nnx.List):
        return _unrolled(model, layer, h, call, memories, places, replayed)
    if memories[0] is None:
        h, seen = _trained(model, layer, h, call, places, replayed, remat)
        return h, memories, seen

    # Decoding is bound by reading weights. A slice of a stack that enters a kernel would be a copy, so experts, which
    # are most of the weights, stay whole and their kernel is told the layer. So does all that kernels for few tokens
    # take; the rest is cut out by number.
    whole_experts = model.runs[0].moe.w1.dtype == model.dtype
    decodes = target_platform() == "gpu" and jax.tree.leaves(h)[0].shape[1] == 1
    few = whole_experts and decodes and (ambient_mesh() is None or model.whole) and not jax.tree.leaves(routes)
    whole = (EXPERTS if whole_experts else ()) + (FOR_FEW_TOKENS if few else ())
    parts = [nnx.split(block, lambda path, _: path[-1] in whole, ...) for block in model.runs]
    repeat = _written_out if decodes and config.num_layers <= FEW_LAYERS else _repeat

    def layers(run: int, period: Any, carry: Any) -> Any:
        graph, experts, weights = parts[run]
        flat = weights, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (places[run], replayed[run]))
        decays = places[run].log_decay.reshape(-1, config.num_heads)
        count = config.runs[run].count

        def one(state: Any, _: Any) -> Any:
            carry, number = state
            weights, place, chosen = jax.tree.map(lambda x: x[number], flat)
            block = nnx.merge(graph, experts, weights if model.whole else gather_weights(weights, model.dtype))
            place = Place(number, decays if few else place.log_decay)
            carry, seen = layer(block, carry, call, place, chosen, whole_experts)
            return (carry, number + 1), seen

        (carry, _), seen = repeat(one, (carry, period * count), count)
        return carry, seen

    def one_period(state: Any, _: Any) -> Any:
        (h, memories), period = state
        seen, renewed = [], []
        for run, memory in enumerate(memories):
            (h, memory), found = layers(run, period, (h, memory))
            renewed.append(memory)
            seen.append(found)
        return ((h, tuple(renewed)), period + 1), jax.tree.map(lambda *x: jnp.concatenate(x), *seen)

    ((h, memories), _), seen = repeat(one_period, ((h, memories), 0), config.num_periods)
    return h, memories, jax.tree.map(lambda x: x.reshape(config.num_layers, *x.shape[2:]), seen)


def _trained(
    model: MiniMaxM1, layer: Layer, h: H, call: Any, places: list[Place], replayed: list[Any], remat: Remat
) -> tuple[H, Seen]:
    """``stack`` without memories, made for its gradient (see ``depth.over_layers``)."""
    config = model.config
    graphs, weights = zip(*(nnx.split(block) for block in model.runs))
    weights = [_products_in(model.dtype, w) for w in weights]
    mesh = ambient_mesh()
    gathered = mesh is not None and mesh.shape["fsdp"] > 1  # then no kernel can read a layer's experts in their stack
    stacks = [None if gathered else _stacks(w) for w in weights]

    def one_layer(run: int, weights: Any, h: H, constants: Any, number: jax.Array | int) -> Any:
        call, places, replayed, stacks = constants
        block = nnx.merge(graphs[run], weights if model.whole else gather_weights(weights, model.dtype))
        place, chosen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[number], (places[run], replayed[run]))
        (h, _), seen = layer(block, (h, None), call, place._replace(layer=number), chosen, stacks[run])
        return (h, seen.aux), seen.routes

    if remat == "auto":
        remat = "none" if target_platform() == "cpu" else "cheap"
    if remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == "cheap" else None
        scanned = config.num_layers > len(config.runs)
        one_layer = jax.checkpoint(one_layer, static_argnums=0, policy=policy, prevent_cse=not scanned)

    counts = [run.count for run in config.runs]
    h, found = over_layers(
        one_layer, config.num_periods, counts, weights, h, (call, places, replayed, jax.lax.stop_gradient(stacks))
    )
    seen = [_by_period(config, Seen(routes, aux)) for aux, routes in found]
    seen = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *seen)
    return h, jax.tree.map(lambda x: x.reshape(config.num_layers, *x.shape[2:]), seen)


def _products_in(dtype: jnp.dtype, weights: Any) -> Any:
    """A run's matrices in the compute dtype, cast once for forward and backward pass; routers and norms stay."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        parameter, _ = parameters.find(path)
        return x.astype(dtype) if len(parameter.shape) > 1 and any(parameter.dimensions) else x

    return jax.tree_util.tree_map_with_path(cast, weights)


def _unrolled(
    model: MiniMaxM1, layer: Layer, h: H, call: Any, memories: tuple[Memory, ...], places: Any, replayed: Any
) -> tuple[H, tuple[Memory, ...], Seen]:
    """``stack`` layer by layer, for ``MiniMaxM1.unstacked``."""
    blocks: Any = model.runs  # lists of blocks here, not stacks
    renewed, seen = list(memories), []
    order = [
        (run, period * kind.count + j, jax.tree.map(operator.itemgetter((period, j)), (places[run], replayed[run])))
        for period in range(model.config.num_periods)
        for run, kind in enumerate(model.config.runs)
        for j in range(kind.count)
    ]
    for run, number, (place, chosen) in order:
        carry = h, renewed[run]
        (h, renewed[run]), found = layer(blocks[run][number], carry, call, place._replace(layer=number), chosen, None)
        seen.append(found)
    return h, tuple(renewed), jax.tree.map(lambda *x: jnp.stack(x), *seen)


def _by_run(config: ModelConfig, values: Any) -> list[Any]:
    """Arrays [layers, ...] as arrays [periods, layers of the run, ...], one for each run of a period."""

    def part(x: jax.Array, run: Run) -> jax.Array:
        x = x.reshape(config.num_periods, config.period, *x.shape[1:])
        return x[:, run.start : run.start + run.count]

    return [jax.tree.map(lambda x, run=run: part(x, run), values) for run in config.runs]


def _by_period(config: ModelConfig, weights: Any) -> Any:
    """A run's parameters [layers, ...] as [periods, layers of a period, ...]."""
    return jax.tree.map(lambda x: x.reshape(config.num_periods, -1, *x.shape[1:]), weights)


def _repeat(body: Any, state: Any, count: int) -> Any:
    """``jax.lax.scan`` over nothing; once: without a loop and its copies."""
    if count > 1:
        return jax.lax.scan(body, jax.tree.map(jnp.asarray, state), length=count)
    state, y = body(state, None)
    return state, jax.tree.map(lambda x: x[None], y)


def _written_out(body: Any, state: Any, count: int) -> Any:
    """``_repeat`` without a loop; traced and lowered once all the same."""
    body, found = jax.jit(body), []
    for _ in range(count):
        state, y = body(state, None)
        found.append(y)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *found)


def _stacks(weights: Any) -> Experts:
    return Experts(*(weights["moe"][name].get_value() for name in Experts._fields))
