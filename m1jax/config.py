"""The configuration of MiniMax-M1 and its two published spellings.

A :class:`ModelConfig` says what M1 is and nothing else: no training options, no hypothetical variants.
It reads and writes the authors' ``config.json`` ("official") and that of Transformers' native ``minimax``
class ("transformers"), which renames most keys.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from m1jax.errors import UserError

LIGHTNING = "lightning"
SOFTMAX = "softmax"
M1_ALPHA = 3.5565588200778455  # report: DeepNorm-style residual scale, the same in all three places

Layout = Literal["official", "transformers"]


class Run(NamedTuple):
    """Equal layers that follow one another in a period: ``count`` of a ``kind`` from its layer ``start`` on."""

    kind: str
    start: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one MiniMax-M1 model (report section 2.1 and the published ``config.json``).

    ``layer_types`` holds one ``"lightning"`` or ``"softmax"`` per layer. Each kind of sub-layer has a pair
    (alpha, beta): the residual stream becomes ``alpha * normed_input + beta * sublayer(normed_input)``.

    Raises:
        UserError: a size is not positive, or sizes do not fit together; the message names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    num_experts: int
    experts_per_token: int
    rope_theta: float = 1e7
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 10_240_000
    lightning_alpha: float = M1_ALPHA
    lightning_beta: float = 1.0
    softmax_alpha: float = M1_ALPHA
    softmax_beta: float = 1.0
    mlp_alpha: float = M1_ALPHA
    mlp_beta: float = 1.0
    shared_intermediate_size: int = 0
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _has_type(value, str(field.type)):
                raise UserError(f"config: {field.name} = {value!r} should be of type {field.type}")
        sizes = (
            "vocab_size hidden_size intermediate_size num_heads num_kv_heads head_dim num_experts experts_per_token "
            "max_position_embeddings"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise UserError(f"config: {name} = {getattr(self, name)}, but it must be at least 1")
        for name in ("rms_norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise UserError(f"config: {name} = {getattr(self, name)}, but it must be positive")
        unknown = [kind for kind in self.layer_types if kind not in (LIGHTNING, SOFTMAX)]
        if unknown or not self.layer_types:
            raise UserError(
                f"config: layer_types must hold 'lightning' and 'softmax', one per layer; found {unknown[:3]}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"config: num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}; "
                "query heads share key/value heads in equal groups"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise UserError(
                f"config: rotary_dim = {self.rotary_dim} must be even and at most head_dim = {self.head_dim}"
            )
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"config: experts_per_token = {self.experts_per_token} is more than num_experts = {self.num_experts}"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @functools.cached_property
    def period(self) -> int:
        """Length of the shortest pattern of layer types that, repeated, gives the whole stack (M1: 8)."""
        for length in range(1, self.num_layers):
            if self.num_layers % length == 0 and self.layer_types == self.layer_types[:length] * (
                self.num_layers // length
            ):
                return length
        return self.num_layers

    @property
    def num_periods(self) -> int:
        return self.num_layers // self.period

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs of equal layers that make up one period (M1: seven lightning layers, one softmax layer)."""
        runs: list[Run] = []
        for place, kind in enumerate(self.layer_types[: self.period]):
            if runs and runs[-1].kind == kind:
                runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
            else:
                runs.append(Run(kind, place, 1))
        return tuple(runs)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The configuration of that name; see ``m1jax.config.PRESETS``.

        Raises:
            UserError: no preset has this name; the message lists those that exist.
        """
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Reads the contents of a ``config.json``, the authors' or Transformers' (told apart by ``model_type``).

        Raises:
            UserError: another model's config, a missing or an unknown key, or a value that M1 does not have.
        """
        model_type = values.get("model_type") if isinstance(values, Mapping) else None
        if model_type in ("minimax_m1", "minimax_text_01"):
            return _read(values, _OFFICIAL_KEYS, _OFFICIAL_FIXED, _read_official_layers)
        if model_type == "minimax":
            return _read(values, _TRANSFORMERS_KEYS, _TRANSFORMERS_FIXED, _read_transformers_layers)
        raise UserError(
            f"config: model_type is {model_type!r}; expected 'minimax_m1', 'minimax_text_01' (the authors' files) "
            "or 'minimax' (Transformers). Is this another model's directory?"
        )

    def to_hf(self, layout: Layout = "official") -> dict[str, Any]:
        """The contents of a ``config.json`` in one of the two layouts; ``from_hf`` reads it back unchanged.

        Warns when Transformers' own class would compute something else from it (partial RoPE, head counts that
        are no power of two); reading it back with this package stays exact.
        """
        if layout == "official":
            return _write(self, _OFFICIAL_KEYS, _OFFICIAL_FIXED) | {
                "architectures": ["MiniMaxM1ForCausalLM"],
                "model_type": "minimax_m1",
                "num_hidden_layers": self.num_layers,
                "attn_type_list": [int(kind == SOFTMAX) for kind in self.layer_types],
                "postnorm": True,
                "shared_moe_mode": "sigmoid",
            }
        if layout != "transformers":
            raise UserError(f"layout must be 'official' or 'transformers', not {layout!r}")
        if self.shared_intermediate_size:
            raise UserError(
                "Transformers' minimax has no shared expert "
                f"(shared_intermediate_size = {self.shared_intermediate_size}); save with layout='official'"
            )
        differs = []
        if self.rotary_dim != self.head_dim:
            differs.append(f"it rotates all {self.head_dim} channels of a head instead of {self.rotary_dim}")
        if self.num_heads & (self.num_heads - 1):
            differs.append(f"its decay slopes for {self.num_heads} heads (no power of two) are not M1's")
        if differs:
            warnings.warn(
                "Transformers' minimax class will not reproduce this model's logits: " + "; ".join(differs),
                stacklevel=2,
            )
        names = {LIGHTNING: "linear_attention", SOFTMAX: "full_attention"}
        return _write(self, _TRANSFORMERS_KEYS, _TRANSFORMERS_FIXED) | {
            "architectures": ["MiniMaxForCausalLM"],
            "model_type": "minimax",
            "num_hidden_layers": self.num_layers,
            "layer_types": [names[kind] for kind in self.layer_types],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_dim / self.head_dim,
            },
        }


def _has_type(value: Any, wanted: str) -> bool:
    """Whether a value read from a file has the type that a field's annotation names."""
    if wanted.startswith("tuple") or isinstance(value, bool):
        return isinstance(value, tuple)
    if wanted == "float":
        # Integers may be larger than any float.
        return isinstance(value, numbers.Real) and abs(cast(float, value)) <= sys.float_info.max
    return isinstance(value, numbers.Integral) or (value is None and "None" in wanted)


def _hybrid(num_layers: int) -> tuple[str, ...]:
    return ((LIGHTNING,) * 7 + (SOFTMAX,)) * (num_layers // 8)


_M1 = ModelConfig(
    vocab_size=200_064,
    hidden_size=6144,
    intermediate_size=9216,
    layer_types=_hybrid(80),
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rotary_dim=64,
    num_experts=32,
    experts_per_token=2,
)

PRESETS: dict[str, ModelConfig] = {
    "m1-456b": _M1,
    "text-01-456b": _M1,  # MiniMax-Text-01, the base model, has the same shape
    "m1-2b": dataclasses.replace(
        _M1,
        vocab_size=32_768,
        hidden_size=2048,
        intermediate_size=2048,
        layer_types=_hybrid(8),
        num_heads=16,
        num_kv_heads=4,
        num_experts=16,
    ),
    "m1-1b": dataclasses.replace(
        _M1,
        vocab_size=32_768,
        hidden_size=1024,
        intermediate_size=1024,
        layer_types=_hybrid(16),
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        rotary_dim=32,
        num_experts=16,
    ),
    "m1-100m": dataclasses.replace(
        _M1,
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=768,
        layer_types=_hybrid(8),
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=32,
        num_experts=8,
    ),
    "m1-tiny": dataclasses.replace(
        _M1,
        vocab_size=256,
        hidden_size=48,
        intermediate_size=80,
        layer_types=_hybrid(8),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rotary_dim=8,
        num_experts=4,
        max_position_embeddings=4096,
    ),
    "m1-demo": dataclasses.replace(
        _M1,
        vocab_size=263,  # m1jax.chat's tiny tokenizer: bytes and the special tokens
        hidden_size=64,
        intermediate_size=64,
        layer_types=(LIGHTNING,) * 3 + (SOFTMAX,),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        # Every dimension turns, and fast enough to tell neighbours apart within the demo's short texts; Transformers'
        # `minimax`, which knows no partial rotation, then computes the same.
        rotary_dim=16,
        rope_theta=100.0,
        num_experts=4,
        max_position_embeddings=4096,
        initializer_range=0.05,
        # M1's alpha is (2 L)^(1/4) at L = 80 layers, DeepNorm's (arXiv 2203.00555); here L = 4.
        lightning_alpha=8**0.25,
        softmax_alpha=8**0.25,
        mlp_alpha=8**0.25,
    ),
}

# Our field for each key of a config.json. A key that stands in none of these tables is an error.
_COMMON_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_OFFICIAL_KEYS = _COMMON_KEYS | {
    "rotary_dim": "rotary_dim",
    "rope_theta": "rope_theta",
    "layernorm_linear_attention_alpha": "lightning_alpha",
    "layernorm_linear_attention_beta": "lightning_beta",
    "layernorm_full_attention_alpha": "softmax_alpha",
    "layernorm_full_attention_beta": "softmax_beta",
    "layernorm_mlp_alpha": "mlp_alpha",
    "layernorm_mlp_beta": "mlp_beta",
    "shared_intermediate_size": "shared_intermediate_size",
}
_TRANSFORMERS_KEYS = _COMMON_KEYS | {
    "linear_attn_alpha_factor": "lightning_alpha",
    "linear_attn_beta_factor": "lightning_beta",
    "full_attn_alpha_factor": "softmax_alpha",
    "full_attn_beta_factor": "softmax_beta",
    "mlp_alpha_factor": "mlp_alpha",
    "mlp_beta_factor": "mlp_beta",
}
# Keys with the one value that M1 has, and keys that say nothing about the mathematics.
_FIXED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_OFFICIAL_FIXED = _FIXED | {"postnorm": True, "shared_moe_mode": "sigmoid"}
_TRANSFORMERS_FIXED = _FIXED
_IGNORED = {
    "architectures",
    "auto_map",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "output_router_logits",
    "pad_token_id",
    "block_size",
    "num_hidden_layers",
    "_name_or_path",
}
_OPTIONAL = {"head_dim", "bos_token_id", "eos_token_id", "initializer_range", "router_aux_loss_coef"} | {
    "shared_intermediate_size",
    "rotary_dim",
}


def _read(
    values: Mapping[str, Any], keys: Mapping[str, str], fixed: Mapping[str, Any], read_layers: Any
) -> ModelConfig:
    structure = {"attn_type_list"} if keys is _OFFICIAL_KEYS else {"layer_types", "rope_parameters"}
    for key, value in values.items():
        if key in fixed and value != fixed[key]:
            raise UserError(f"config: {key} = {value!r}, but MiniMax-M1 is defined with {fixed[key]!r} only")
        if key not in keys and key not in fixed and key not in _IGNORED and key not in structure:
            raise UserError(
                f"config: unknown key {key!r} in a {values['model_type']!r} config; "
                "this file mixes two formats or describes another model"
            )
    missing = [key for key in keys if key not in values and key not in _OPTIONAL] + sorted(structure - set(values))
    if keys is _OFFICIAL_KEYS and "postnorm" not in values:
        missing.append("postnorm")  # the authors' code takes its absence for False, which is another model
    if missing or "num_hidden_layers" not in values:
        raise UserError(f"config: missing {', '.join(missing or ['num_hidden_layers'])}")
    fields = {field: values[key] for key, field in keys.items() if key in values}
    for key in sorted(structure):
        if not isinstance(values[key], Mapping if key == "rope_parameters" else list | tuple):
            raise UserError(f"config: {key} = {values[key]!r} is of the wrong type")
    if fields.get("head_dim") is None:
        for name in ("hidden_size", "num_heads"):
            if not _has_type(fields[name], "int") or fields[name] < 1:
                raise UserError(f"config: {name} = {fields[name]!r} should be a positive integer")
        fields["head_dim"] = fields["hidden_size"] // fields["num_heads"]
    fields.setdefault("rotary_dim", fields["head_dim"])
    fields |= read_layers(values, fields)
    if len(fields["layer_types"]) != values["num_hidden_layers"]:
        raise UserError(
            f"config: num_hidden_layers = {values['num_hidden_layers']}, but {len(fields['layer_types'])} layer types"
        )
    return ModelConfig(**fields)


def _read_official_layers(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    kinds = values["attn_type_list"]
    unknown = [kind for kind in kinds if kind not in (0, 1)]
    if unknown:
        raise UserError(f"config: attn_type_list holds 0 (lightning) and 1 (softmax), found {unknown[:3]}")
    return {"layer_types": tuple(SOFTMAX if kind else LIGHTNING for kind in kinds)}


def _read_transformers_layers(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}
    unknown = [kind for kind in values["layer_types"] if kind not in tuple(names)]
    if unknown:
        raise UserError(f"config: layer_types holds {unknown[:3]}; expected 'linear_attention' and 'full_attention'")
    rope = values["rope_parameters"]
    for name, value in (
        ("head_dim", fields["head_dim"]),
        ("rope_parameters.rope_theta", rope.get("rope_theta")),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)),
    ):
        if not _has_type(value, "float"):
            raise UserError(f"config: {name} = {value!r} should be a number")
    if not 0 <= rope.get("partial_rotary_factor", 1.0) <= 1:
        raise UserError(f"config: partial_rotary_factor = {rope['partial_rotary_factor']} must lie between 0 and 1")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"config: rope_type {rope['rope_type']!r}; MiniMax-M1 has unscaled RoPE ('default') only")
    return {
        "layer_types": tuple(names[name] for name in values["layer_types"]),
        "rope_theta": rope["rope_theta"],
        "rotary_dim": round(fields["head_dim"] * rope.get("partial_rotary_factor", 1.0)),
    }


def _write(config: ModelConfig, keys: Mapping[str, str], fixed: Mapping[str, Any]) -> dict[str, Any]:
    return {key: getattr(config, field) for key, field in keys.items()} | dict(fixed)
