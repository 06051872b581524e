"""The one table of names and shapes: every official tensor and the slice of our parameter tree that it is.

Our tree stacks a layer's parameters over periods, the files hold one tensor per layer (and per expert):
``model.layers.{i * period + j}.block_sparse_moe.experts.{e}.w1.weight`` is ``layers[j].moe.w1[i, e]``. The table is a
bijection: each tensor has one place, and the places of all tensors fill every parameter exactly once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from m1jax.config import LIGHTNING, ModelConfig

Path = tuple[str | int, ...]


class Tensor(NamedTuple):
    """One tensor of a checkpoint and its place in our tree: ``parameters[path][index]``, without transposition.

    ``index`` is () for the embedding, the last norm and the head, (period,) in layers, (period, expert) in experts.
    ``router`` marks the weights that are float32 whatever dtype the others have.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    index: tuple[int, ...]
    router: bool = False

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@functools.lru_cache(maxsize=8)
def tensors(config: ModelConfig, *, merged_experts: bool = False) -> tuple[Tensor, ...]:
    """All tensors of a checkpoint in the order of the model, named as in the authors' files.

    Args:
        config: the model's shape.
        merged_experts: one tensor [experts, out, in] per layer instead of one per expert, named without the
            expert's number: ``...experts.w1.weight``. This is what Orbax checkpoints hold; nobody else's files do.
    """
    return tuple(_tensors(config, merged_experts))


@functools.lru_cache(maxsize=8)
def by_path(config: ModelConfig, *, merged_experts: bool = False) -> Mapping[Path, tuple[Tensor, ...]]:
    """The tensors that fill each parameter of our tree, in the order of their indices."""
    places: dict[Path, list[Tensor]] = {}
    for tensor in tensors(config, merged_experts=merged_experts):
        places.setdefault(tensor.path, []).append(tensor)
    return {path: tuple(sorted(here, key=lambda tensor: tensor.index)) for path, here in places.items()}


def tree_path(path: Any) -> Path:
    """A path of ``jax.tree_util`` as the table has it: ("layers", 0, "moe", "w1"). Flax's own end is left out."""
    import jax

    parts = []
    for part in path:
        if isinstance(part, jax.tree_util.DictKey):
            parts.append(part.key)
        elif isinstance(part, jax.tree_util.SequenceKey):
            parts.append(part.idx)
    return tuple(parts)


class Merged(NamedTuple):
    """One tensor of a file that holds official ones of shape ``part_shape``: their names and first elements in it."""

    name: str
    shape: tuple[int, ...]
    part_shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]


def transformers_merged(config: ModelConfig) -> tuple[Merged, ...]:
    """The tensors of Transformers' ``minimax`` as it holds them in memory, in the order of the model.

    Files look like this if written with ``save_pretrained(..., save_original_format=False)``; it loads both. In a layer
    ``mlp.experts.gate_up_proj`` [E, 2F, D] holds w1 above w3 of each expert, ``mlp.experts.down_proj`` [E, D, F] w2.
    """
    hidden, inner, experts = config.hidden_size, config.intermediate_size, range(config.num_experts)
    out = []
    for tensor in tensors(config, merged_experts=True):
        moe, _, name = tensor.name.partition(".block_sparse_moe.")
        if not name:
            out.append(Merged(tensor.name, tensor.shape, tensor.shape, ((tensor.name, 0),)))
        elif name == "gate.weight":
            out.append(Merged(f"{moe}.mlp.gate.weight", tensor.shape, tensor.shape, ((tensor.name, 0),)))
        elif name == "experts.w1.weight":
            parts = [
                (f"{moe}.block_sparse_moe.experts.{e}.{w}.weight", (2 * e + i) * inner * hidden)
                for e in experts
                for i, w in enumerate(("w1", "w3"))
            ]
            shape = (len(experts), 2 * inner, hidden)
            out.append(Merged(f"{moe}.mlp.experts.gate_up_proj", shape, (inner, hidden), tuple(parts)))
        elif name == "experts.w2.weight":
            parts = [(f"{moe}.block_sparse_moe.experts.{e}.w2.weight", e * inner * hidden) for e in experts]
            out.append(Merged(f"{moe}.mlp.experts.down_proj", tensor.shape, (hidden, inner), tuple(parts)))
    return tuple(out)


def _tensors(config: ModelConfig, merged_experts: bool) -> Iterator[Tensor]:
    hidden = config.hidden_size
    yield Tensor("model.embed_tokens.weight", (config.vocab_size, hidden), ("embed_tokens",), ())
    for layer, kind in enumerate(config.layer_types):
        i, j = divmod(layer, config.period)
        for name, path, shape in _layer(config, kind):
            yield Tensor(f"model.layers.{layer}.{name}.weight", shape, ("layers", j, *path), (i,), path[-1] == "gate")
        for name, shape in _expert(config):
            if merged_experts:
                full = f"model.layers.{layer}.block_sparse_moe.experts.{name}.weight"
                yield Tensor(full, (config.num_experts, *shape), ("layers", j, "moe", name), (i,))
                continue
            for e in range(config.num_experts):
                full = f"model.layers.{layer}.block_sparse_moe.experts.{e}.{name}.weight"
                yield Tensor(full, shape, ("layers", j, "moe", name), (i, e))
    yield Tensor("model.norm.weight", (hidden,), ("norm",), ())
    yield Tensor("lm_head.weight", (config.vocab_size, hidden), ("lm_head",), ())


def _layer(config: ModelConfig, kind: str) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    """(name under the layer, path under our block, shape) of everything in a layer but the experts."""
    hidden, inner, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm", ("input_layernorm",), (hidden,)
    yield "post_attention_layernorm", ("post_attention_layernorm",), (hidden,)
    if kind == LIGHTNING:
        attention = {
            "qkv_proj": (3 * inner, hidden),
            "output_gate": (inner, hidden),
            "norm": (inner,),
            "out_proj": (hidden, inner),
        }
    else:
        attention = {
            "q_proj": (inner, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, inner),
        }
    for name, shape in attention.items():
        yield f"self_attn.{name}", ("attention", name), shape
    yield "block_sparse_moe.gate", ("moe", "gate"), (config.num_experts, hidden)
    if shared := config.shared_intermediate_size:
        yield "shared_mlp.gate_proj", ("moe", "shared_mlp", "gate_proj"), (shared, hidden)
        yield "shared_mlp.up_proj", ("moe", "shared_mlp", "up_proj"), (shared, hidden)
        yield "shared_mlp.down_proj", ("moe", "shared_mlp", "down_proj"), (hidden, shared)
        yield "coefficient", ("moe", "coefficient"), (1, hidden)


def _expert(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "w1", (inner, hidden)
    yield "w3", (inner, hidden)
    yield "w2", (hidden, inner)
