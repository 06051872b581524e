"""The one table of names and shapes: every official tensor and the slice of our parameter tree that it is.

Our tree stacks the parameters of a run's layers, the files hold one tensor per layer (and per expert):
``model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight`` is ``runs[r].moe.w1[n, e]``, where layer l is the n-th of
run r. The table is a bijection: each tensor has one place, and the places of all fill every parameter exactly once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from m1jax import parameters
from m1jax.config import ModelConfig

Path = tuple[str | int, ...]


class Tensor(NamedTuple):
    """One tensor of a checkpoint and its place in our tree: ``parameters[path][index]``, without transposition.

    ``index`` is () for the embedding, the last norm and the head, (n,) in layers, (n, expert) in experts.
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
    embed_tokens, norm, lm_head = (Tensor(f"{p.name}.weight", p.shape, p.path, ()) for p in parameters.of_model(config))
    yield embed_tokens
    for layer in range(config.num_layers):
        period, place = divmod(layer, config.period)
        number, run = next((i, r) for i, r in enumerate(config.runs) if place < r.start + r.count)
        index = period * run.count + place - run.start
        for parameter in sorted(parameters.of_block(config, run.kind), key=lambda p: p.per_expert):
            name, path = f"model.layers.{layer}.{parameter.name}.weight", ("runs", number, *parameter.path)
            if not parameter.per_expert or merged_experts:
                yield Tensor(name.replace(".{}", ""), parameter.shape, path, (index,), parameter.router)
                continue
            for e in range(config.num_experts):
                yield Tensor(name.format(e), parameter.shape[1:], path, (index, e))
    yield norm
    yield lm_head
