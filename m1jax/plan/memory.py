"""Bytes per device, by kind, of one step: from the sharding table and from what XLA keeps at the moment of its peak.

Exact are parameters, optimizer and caches. The rest are the arrays that the compiled programs for TPUs hold when they
need most, read off their schedules (`experiments/plan_memory` compares with the compiler). bf16 compute throughout.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from m1jax.config import LIGHTNING, ModelConfig
from m1jax.model import MiniMaxM1
from m1jax.model.cache import key_value_bytes, state_bytes
from m1jax.model.head import CHUNK_ELEMENTS
from m1jax.model.parallel import pieces
from m1jax.plan.hardware import Platform
from m1jax.plan.setup import Setup
from m1jax.sharding import parameter_specs, vocabulary_is_cut
from pallas_kernels.vocabulary.chunks import Chunks

Bytes = dict[str, float]


def memory(setup: Setup, platform: Platform) -> Bytes:
    """Kind -> bytes on each device when the step needs most."""
    if setup.task == "generate":
        return _generation(setup)
    in_stacks = setup.remat == "cheap" or (setup.remat == "layers" and platform == "gpu")
    return _in_stacks(setup) if in_stacks else _scheduled(setup)


def elements(setup: Setup) -> tuple[float, float]:
    """Parameters on one device: (of the layers, of embedding, head and last norm). Generation cuts them over expert and
    tensor alone, and gathers none of them for a step."""
    layers = other = 0.0
    for in_layer, size, axes in _leaves(setup.model, setup.mesh["tensor"], setup.task == "generate"):
        share = size / math.prod(setup.mesh[axis] for axis in axes)
        layers, other = (layers + share, other) if in_layer else (layers, other + share)
    return layers, other


def expert_bytes(setup: Setup) -> float:
    """w1, w3 and w2 of one layer in bfloat16 on one device, gathered over fsdp for use."""
    m, mesh = setup.model, setup.mesh
    return 2 * 3 * m.num_experts / mesh["expert"] * m.intermediate_size / mesh["tensor"] * m.hidden_size


def attention_bytes(setup: Setup) -> float:
    """The projections of the mean layer in bfloat16 on one device, gathered over fsdp and expert for use."""
    m = setup.model
    inner, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    lightning = m.layer_types.count(LIGHTNING)
    size = lightning * 5 * inner + (m.num_layers - lightning) * 2 * (inner + kv)
    return 2 * m.hidden_size * size / m.num_layers / setup.mesh["tensor"]


def gathered_tokens(setup: Setup) -> int:
    """Tokens a device would see in the experts if it took them all at once."""
    return setup.rows_per_device * setup.residual_time * setup.expert_group


def expert_pieces(setup: Setup) -> int:
    """Pieces that a device takes them in."""
    return pieces(setup.rows_per_device * setup.residual_time, setup.expert_group, setup.model.hidden_size)


def head_bytes(setup: Setup) -> float:
    """The head in float32 on one device, gathered for use."""
    return 4 * setup.model.hidden_size * words(setup)


def words(setup: Setup) -> float:
    """Of the vocabulary, on one device."""
    count = setup.model.vocab_size
    return count / setup.mesh["tensor"] if vocabulary_is_cut(count, setup.mesh) else count


def _in_stacks(setup: Setup) -> Bytes:
    """As on GPUs: what is kept lies in stacks of all layers, and layers' gradients are bfloat16."""
    m, mesh = setup.model, setup.mesh
    layers, other = elements(setup)
    lightning = m.layer_types.count(LIGHTNING)
    inner, kv = (2 * heads * m.head_dim / mesh["tensor"] for heads in (m.num_heads, m.num_kv_heads))
    tokens = setup.rows_per_device * setup.time_per_device
    stream = 2 * setup.rows_per_device * setup.residual_time * m.hidden_size
    routed = 2 * m.experts_per_token * gathered_tokens(setup)
    width = m.intermediate_size / mesh["tensor"]
    whole = expert_bytes(setup) * (2 if mesh["fsdp"] > 1 else 1)  # gathered, or cut out; and the gradients
    at_once = routed / expert_pieces(setup)
    if setup.remat == "cheap":
        # The residual and what attention adds to it; q, k, v, gate and the mix of them; both inner arrays of experts.
        saved = m.num_layers * 2 * stream + lightning * tokens * 5 * inner
        saved += (m.num_layers - lightning) * tokens * 2 * (inner + kv)
        saved += m.num_layers * routed * 2 * width
        layer = 6 * stream + 3 * tokens * inner + at_once * (4 * width + 4 * m.hidden_size) + whole
    else:
        # The residual alone. In the experts' backward pass: all of attention (q, k, v before and after their
        # activation, gate, mix, normed mix; both normed residuals and what attention adds), two gradients of the
        # residual, and routed the tokens and their gradient with and without its weight; of the width two arrays, the
        # gradient of what they become, what they become, and their own gradients.
        saved = m.num_layers * stream
        layer = 5 * stream + 9 * tokens * inner + at_once * (6 * width + 3 * m.hidden_size) + whole
    head = 3 * head_bytes(setup) + 6 * min(CHUNK_ELEMENTS, tokens * words(setup))
    summed = 4 * (layers + other) if setup.micro_batches > 1 else 0.0
    return {
        "parameters": 4 * (layers + other),
        "optimizer": 8 * (layers + other),
        "gradients": 2 * layers + 4 * other + summed,
        "weights cast": 2 * layers,
        "activations": saved,
        "temporaries": max(layer, head),
    }


def _scheduled(setup: Setup) -> Bytes:
    """As XLA's schedules for TPUs hold it, at the larger of two peaks: in the head, or in a layer's backward pass."""
    layers, other = elements(setup)
    count = layers + other
    tokens = setup.rows_per_device * setup.time_per_device
    chunks = Chunks(tokens, int(words(setup)))
    summed = 4 * count if setup.micro_batches > 1 else 0.0
    # Summed over chunks, the head's gradient stays float32 and whole until the layers are through.
    gradients = 2 * layers + (head_bytes(setup) if chunks.count > 1 else 0.0)
    layer = _layer(setup)
    if chunks.count > 1:  # the head as gathered, its three bfloat16 parts and these side by side; a chunk's scores
        head = 4 * head_bytes(setup) + 4 * chunks.size * words(setup)
    else:  # two parts, and all scores or the head as gathered
        head = head_bytes(setup) + max(4 * tokens * words(setup), head_bytes(setup))
    in_layer = gradients + layer > head
    return {
        "parameters": 4 * count,
        "optimizer": 8 * count,
        "gradients": summed + (gradients if in_layer else 0.0),
        "weights cast": 2 * layers if setup.remat == "layers" else 0.0,  # else they are kept gathered
        "activations": _saved(setup),
        "temporaries": layer if in_layer else head,
    }


def _saved(setup: Setup) -> float:
    """What all layers keep for their backward passes on TPUs."""
    m = setup.model
    if setup.remat == "layers":
        return m.num_layers * _stream(setup)
    tokens = setup.rows_per_device * setup.time_per_device
    # bfloat16: the residual twice and what its norms made of it; float32: what the router reads. Of the heads' width 25
    # of both kinds of attention together.
    saved = expert_bytes(setup) + attention_bytes(setup)
    saved += tokens * (10 * m.hidden_size + 25 * m.num_heads * m.head_dim / setup.mesh["tensor"])
    if expert_pieces(setup) == 1:  # else its pieces are recomputed in any case
        # Of each routed token the input (bfloat16), the output and whether it is one; of the inner width five arrays of
        # float32, one of bfloat16, two of truth values.
        saved += _routed(setup) * (7 * m.hidden_size + 24 * m.intermediate_size / setup.mesh["tensor"])
    return m.num_layers * saved


def _layer(setup: Setup) -> float:
    """What one layer's backward pass holds on TPUs beside that when it is in the experts."""
    m = setup.model
    pieces = expert_pieces(setup)
    rows, inner = (_routed(setup) * width for width in (m.hidden_size, m.intermediate_size / setup.mesh["tensor"]))
    weights = expert_bytes(setup) / 3  # w1, w3 or w2, gathered, or its gradient
    # All beside the gradient of what the experts add, float32. Which of these moments come is the scheduler's choice.
    experts = 4 * gathered_tokens(setup) / pieces * m.hidden_size + max(
        # float32 gradients of the output and, by w1 and by w3, of the input; of the inner width float32 and bfloat16
        12 * rows + 6 * inner + 4 * weights,
        # float32 output, sorted and as routed, and its gradient; bfloat16 input; of the inner width float32 twice
        14 * rows + 10 * inner + 2 * weights,
        # float32 gradient of the output; bfloat16 input; of the inner width float32 three times
        6 * rows + 14 * inner + 3 * weights,
    )
    if pieces > 1:  # what is summed over them: the weights' gradients; and where the tokens' are put
        experts += expert_bytes(setup) + _stream(setup)
    if setup.remat == "none":
        return experts
    # Of a lightning layer, which holds more than a softmax layer: its input, q, k and v before and after their
    # activation, gate and mix; its weights; and between the blocks the residual, its norm and its gradient.
    heads = m.num_heads * m.head_dim / setup.mesh["tensor"]
    tokens = setup.rows_per_device * setup.time_per_device
    attention = 2 * tokens * (m.hidden_size + 8 * heads) + 10 * m.hidden_size * heads
    return experts + attention + 3 * _stream(setup)


def _stream(setup: Setup) -> float:
    """A residual in bfloat16 on one device."""
    return 2 * setup.rows_per_device * setup.residual_time * setup.model.hidden_size


def _routed(setup: Setup) -> float:
    """Tokens of all experts on one device, in one piece."""
    return setup.model.experts_per_token * gathered_tokens(setup) / expert_pieces(setup)


def _generation(setup: Setup) -> Bytes:
    m = setup.model
    layers, other = elements(setup)
    rows, tensor = setup.rows_per_device, setup.mesh["tensor"]
    states = rows / tensor * state_bytes(m)
    kv = rows * setup.context / tensor * key_value_bytes(m, jnp.bfloat16)
    softmax = m.num_layers - m.layer_types.count(LIGHTNING)
    layer = kv / max(softmax, 1) if setup.piece > 1 else 0.0  # its keys and values; decoding takes those of all layers
    routed = m.experts_per_token * gathered_tokens(setup) / expert_pieces(setup)
    experts = routed * (8 * m.hidden_size + 4 * m.intermediate_size / tensor)
    experts += expert_bytes(setup) / 3  # w1, w3 and w2 are cut out one after the other
    return {
        "parameters": 2 * (layers + other) + 2 * m.num_layers * m.num_experts * m.hidden_size,  # float32 routers
        "states": states,
        "KV cache": kv,
        "temporaries": max(layer, experts),
    }


@functools.lru_cache(maxsize=8)
def _parameters(config: ModelConfig) -> nnx.State:
    return nnx.split(nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))[1]


@functools.lru_cache(maxsize=64)
def _leaves(config: ModelConfig, tensor: int, whole: bool) -> tuple[tuple[bool, int, tuple[str, ...]], ...]:
    """(in a layer, number of elements, mesh axes it is cut over) of every parameter; of the mesh's sizes, only that of
    tensor matters."""
    params = _parameters(config)
    specs = parameter_specs(params, {"tensor": tensor}, whole=whole)
    specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    found = []
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs):
        axes = [a for entry in spec if entry is not None for a in ((entry,) if isinstance(entry, str) else entry)]
        found.append(("runs" in jax.tree_util.keystr(path), math.prod(leaf.shape), tuple(axes)))
    return tuple(found)
