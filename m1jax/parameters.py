"""Every parameter of M1, declared once: shape, dimensions, initialisation, official name, whether it decays.

The model makes its arrays from these declarations, ``m1jax.sharding`` finds where they lie, the table of official names
is derived from them, and the optimizer asks which of them weight decay applies to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal

from m1jax.config import LIGHTNING, SOFTMAX, ModelConfig

Dimension = Literal["vocab", "hidden", "heads", "inner", "experts"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of one layer, or of the model as a whole.

    Attributes:
        path: where it is in our tree, below its block (``("attention", "qkv_proj")``) or at the top.
        name: official name without the layer's prefix and without ``.weight``. Experts are one tensor each in files:
            ``{}`` stands for the expert's number.
        shape: of one layer, [out, in] as in the files; experts in front.
        dimensions: what its axes are, for sharding (None: the axis is never cut).
        init: drawn from N(0, initializer_range^2), or ones.
        router: float32 whatever dtype the others have, as in the released checkpoint.
        decays: whether weight decay applies: matrices yes, norms and the tables of words no.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    dimensions: tuple[Dimension, ...]
    init: Literal["normal", "ones"] = "normal"
    router: bool = False
    decays: bool = True

    @property
    def per_expert(self) -> bool:
        """Whether files hold one tensor per expert."""
        return "{}" in self.name


@functools.lru_cache(maxsize=16)
def of_model(config: ModelConfig) -> tuple[Parameter, ...]:
    """Embedding, last norm and head, in the order of the official files."""
    words, hidden = config.vocab_size, config.hidden_size
    return (
        Parameter(
            path=("embed_tokens",),
            name="model.embed_tokens",
            shape=(words, hidden),
            dimensions=("vocab", "hidden"),
            decays=False,
        ),
        _norm(("norm",), "model.norm", hidden),
        Parameter(
            path=("lm_head",), name="lm_head", shape=(words, hidden), dimensions=("vocab", "hidden"), decays=False
        ),
    )


@functools.lru_cache(maxsize=16)
def of_block(config: ModelConfig, kind: str) -> tuple[Parameter, ...]:
    """One layer of a kind, in the order in which they are drawn and in which files hold them."""
    hidden, inner, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    experts, width, shared = config.num_experts, config.intermediate_size, config.shared_intermediate_size

    def attention(name: str, shape: tuple[int, int], dimensions: tuple[Dimension, ...]) -> Parameter:
        return Parameter(path=("attention", name), name=f"self_attn.{name}", shape=shape, dimensions=dimensions)

    into: tuple[Dimension, ...] = ("heads", "hidden")
    out: tuple[Dimension, ...] = ("hidden", "heads")
    found = [
        _norm(("input_layernorm",), "input_layernorm", hidden),
        _norm(("post_attention_layernorm",), "post_attention_layernorm", hidden),
    ]
    if kind == LIGHTNING:
        found += [
            attention("qkv_proj", (3 * inner, hidden), into),  # head by head, so that a cut falls between heads
            attention("output_gate", (inner, hidden), into),
            _norm(("attention", "norm"), "self_attn.norm", inner, "heads"),
            attention("out_proj", (hidden, inner), out),
        ]
    else:
        found += [
            attention("q_proj", (inner, hidden), into),
            attention("k_proj", (kv, hidden), into),
            attention("v_proj", (kv, hidden), into),
            attention("o_proj", (hidden, inner), out),
        ]
    found.append(
        Parameter(
            path=("moe", "gate"),
            name="block_sparse_moe.gate",
            shape=(experts, hidden),
            dimensions=(None, None),
            router=True,
        )
    )
    up: tuple[Dimension, ...] = ("experts", "inner", "hidden")
    down: tuple[Dimension, ...] = ("experts", "hidden", "inner")
    for name, shape, dimensions in (
        ("w1", (width, hidden), up),
        ("w3", (width, hidden), up),
        ("w2", (hidden, width), down),
    ):
        official = f"block_sparse_moe.experts.{{}}.{name}"
        found.append(Parameter(path=("moe", name), name=official, shape=(experts, *shape), dimensions=dimensions))
    if shared:
        for name, shape, dimensions in (
            ("gate_proj", (shared, hidden), up[1:]),
            ("up_proj", (shared, hidden), up[1:]),
            ("down_proj", (hidden, shared), down[1:]),
        ):
            path = ("moe", "shared_mlp", name)
            found.append(Parameter(path=path, name=f"shared_mlp.{name}", shape=shape, dimensions=dimensions))
        found.append(
            Parameter(path=("moe", "coefficient"), name="coefficient", shape=(1, hidden), dimensions=(None, None))
        )
    return tuple(found)


def _norm(path: tuple[str, ...], name: str, size: int, dimension: Dimension = None) -> Parameter:
    return Parameter(path=path, name=name, shape=(size,), dimensions=(dimension,), init="ones", decays=False)


def find(path: Iterable[Any]) -> tuple[Parameter, bool]:
    """The declaration of what lies at a path of a pytree, and whether it is a layer's. Whatever has a parameter's name,
    a gradient or an optimizer's moment, is found like the parameter; sizes are those of some model.

    Args:
        path: keys as ``jax.tree_util`` gives them.

    Raises:
        KeyError: there is no parameter of this name.
    """
    names = path_names(path)
    for end in (names[-2:], names[-1:]):  # ("attention", "norm") before ("norm",)
        if end in _declared():
            return _declared()[end]
    raise KeyError(f"{'.'.join(names)} is no parameter of M1; declare it in m1jax.parameters")


def path_names(path: Iterable[Any]) -> tuple[str, ...]:
    """The names along a path of a pytree; Flax's own "value" is left out."""
    keys = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
    return tuple(key for key in keys if key not in ("value", "raw_value"))


@functools.cache
def _declared() -> dict[tuple[str, ...], tuple[Parameter, bool]]:
    config = dataclasses.replace(ModelConfig.preset("m1-tiny"), shared_intermediate_size=1)
    blocks = (parameter for kind in (LIGHTNING, SOFTMAX) for parameter in of_block(config, kind))
    return {p.path[-2:]: (p, True) for p in blocks} | {p.path: (p, False) for p in of_model(config)}
