"""The table of names is a bijection, and exactly the published model's."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig
from m1jax.weights.names import tensors, tree_path
from m1jax.weights.safetensors import Plan

SHARED = ModelConfig.preset("m1-tiny")
CONFIGS = {
    "m1-456b": ModelConfig.preset("m1-456b"),
    "m1-tiny": SHARED,
    "shared expert": dataclasses.replace(SHARED, shared_intermediate_size=24),
    "odd pattern": dataclasses.replace(SHARED, layer_types=("softmax", "lightning", "lightning")),
}
PUBLISHED = Path(__file__).parents[3] / "shared/data/minimax-m1/model.safetensors.index.json"


def abstract(config, dtype=jnp.float32):
    state = nnx.split(nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0), param_dtype=dtype)))[1]
    return {tree_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("merged", [False, True], ids=["split", "merged"])
def test_every_name_has_one_place_and_every_parameter_is_filled_once(config, merged):
    parameters, filled, names = abstract(config), {}, set()
    for tensor in tensors(config, merged_experts=merged):
        assert tensor.name not in names
        names.add(tensor.name)
        leaf = parameters[tensor.path]
        assert leaf.shape[len(tensor.index) :] == tensor.shape
        assert all(i < n for i, n in zip(tensor.index, leaf.shape))
        assert tensor.router == (leaf.dtype == jnp.float32 and tensor.path[-1] == "gate")
        indices = filled.setdefault(tensor.path, set())
        assert tensor.index not in indices
        indices.add(tensor.index)
    assert filled.keys() == parameters.keys()
    for path, indices in filled.items():
        depth = len(next(iter(indices)))
        assert len(indices) == math.prod(parameters[path].shape[:depth])


def test_the_456b_model_is_the_published_one():
    config = ModelConfig.preset("m1-456b")
    table = tensors(config)
    assert len(table) == 8243
    assert sum(t.size for t in table) == 456_089_655_296
    assert sum(math.prod(x.shape) for x in abstract(config).values()) == 456_089_655_296
    idle = sum(t.size for t in table if "experts" in t.name) * (1 - config.experts_per_token / config.num_experts)
    ends = sum(t.size for t in table if t.name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert round((456_089_655_296 - idle - ends) / 1e9, 2) == 45.94
    bfloat16 = {t.name: np.dtype(np.float32 if t.router else jnp.bfloat16) for t in table}
    plan = Plan((t.name, t.shape, bfloat16[t.name]) for t in table)
    assert plan.total_size == 912_210_767_872
    shapes = {t.name.partition("layers.")[2].partition(".")[2]: t.shape for t in table[: len(table) // 5]}
    assert shapes["self_attn.qkv_proj.weight"] == (24576, 6144)
    assert shapes["self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published index is not beside this checkout")
def test_the_names_are_those_of_the_published_index():
    index = json.loads(PUBLISHED.read_text())
    assert {t.name for t in tensors(ModelConfig.preset("m1-456b"))} == set(index["weight_map"])
    assert index["metadata"]["total_size"] == 912_210_767_872
