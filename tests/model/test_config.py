"""ModelConfig: presets, periods, and reading and writing the two published spellings."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from m1jax import ModelConfig, UserError
from m1jax.config import LIGHTNING, PRESETS, SOFTMAX

PUBLISHED = Path(__file__).parents[2].parent / "shared/data/minimax-m1/config.json"
TINY = ModelConfig.preset("m1-tiny")


def test_published_config_is_the_preset():
    if not PUBLISHED.exists():
        pytest.skip(f"the published config.json is not at {PUBLISHED.parent}")
    assert ModelConfig.from_hf(json.loads(PUBLISHED.read_text())) == ModelConfig.preset("m1-456b")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_every_part_and_survive_both_layouts(name):
    config = ModelConfig.preset(name)
    assert {LIGHTNING, SOFTMAX} == set(config.layer_types)
    assert config.num_kv_heads < config.num_heads
    partial = name != "m1-demo"  # trained for minutes, on texts that need sharper positions
    assert (config.rotary_dim < config.head_dim) == partial
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf("official")))) == config
    with pytest.warns(UserWarning, match="rotates all") if partial else contextlib.nullcontext():
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf("transformers")))) == config


@pytest.mark.parametrize(
    ("pattern", "period"), [("LLLLLLLS" * 3, 8), ("LS", 2), ("LL", 1), ("LLS", 3), ("SLLS", 4), ("LSLS", 2), ("L", 1)]
)
def test_period_is_the_shortest_repeating_pattern(pattern, period):
    kinds = tuple({"L": LIGHTNING, "S": SOFTMAX}[letter] for letter in pattern)
    config = dataclasses.replace(TINY, layer_types=kinds)
    assert (config.period, config.num_periods) == (period, len(pattern) // period)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3 does not divide"),
        ({"rotary_dim": 7}, "rotary_dim = 7"),
        ({"rotary_dim": 32}, "rotary_dim = 32"),
        ({"experts_per_token": 9}, "experts_per_token = 9"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"layer_types": ("linear",)}, "linear"),
        ({"layer_types": ()}, "layer_types"),
        ({"layer_types": (["softmax"], 1)}, r"layer_types must hold .* found \[\['softmax'\], 1\]"),
        ({"rope_theta": 10**400}, "rope_theta = 1000"),
        ({"softmax_alpha": float("nan")}, "softmax_alpha = nan"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"typo_size": 3}, "unknown key 'typo_size'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"postnorm": False}, "postnorm = False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"num_hidden_layers": 9}, "num_hidden_layers = 9"),
        ({"attn_type_list": [2] * 8}, "attn_type_list"),
        ({"attn_type_list": [[0], "1", *[0] * 6]}, r"attn_type_list .* found \[\[0\], '1'\]"),
        # A Transformers key in an official file: its own class would silently take the wrong layers and alphas.
        ({"layer_types": ["full_attention"] * 8}, "unknown key 'layer_types'"),
    ],
)
def test_configs_of_other_models_are_refused(change, message):
    values = TINY.to_hf("official") | change
    values = {key: value for key, value in values.items() if value is not None or key.endswith("_id")}
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": [["full_attention"], *[0] * 7]}, r"layer_types holds \[\['full_attention'\], 0, 0\]"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1e308}}, "partial_rotary_factor = 1e.308"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type 'yarn'"),
    ],
)
def test_what_is_wrong_in_a_config_of_transformers_is_named(change, message):
    full = dataclasses.replace(TINY, rotary_dim=TINY.head_dim)
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(full.to_hf("transformers") | change)


def test_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match="m1-456b"):
        ModelConfig.preset("m2")
