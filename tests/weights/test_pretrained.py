"""From the authors' files to our model and back, exact to the byte, on any mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from m1jax import MiniMaxM1, ModelConfig, UserError, from_pretrained, save_pretrained
from m1jax.chat import Tokenizer
from m1jax.sharding import make_mesh
from m1jax.weights.safetensors import Weights


@pytest.fixture(scope="module")
def model(golden):
    return from_pretrained(golden)


def contents(directory):
    weights = Weights(directory)
    return {name: (e.dtype, e.shape, weights.array(name).tobytes()) for name, e in weights.entries.items()}


def same_parameters(a, b):
    for x, y in zip(jax.tree.leaves(nnx.split(a)[1]), jax.tree.leaves(nnx.split(b)[1]), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_logits_are_the_authors(model, golden):
    data = np.load(golden / "golden.npz")
    logits = model(jnp.asarray(data["input_ids"], jnp.int32))[:, data["positions"]]
    assert np.abs(logits - data["logits"]).max() <= 5e-5


def test_the_dtype_is_the_platforms_unless_given(model, golden):
    assert model.dtype == jnp.float32
    assert model.embed_tokens.dtype == jnp.float32
    half = from_pretrained(golden, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert half.runs[0].moe.w1.dtype == jnp.bfloat16
    assert half.runs[0].moe.gate.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["loaded as bfloat16", "loaded as float32"])
def test_official_to_ours_to_official_is_identical(golden, tmp_path, dtype):
    save_pretrained(from_pretrained(golden, dtype=dtype), tmp_path / "out", dtype=jnp.bfloat16)
    assert contents(tmp_path / "out") == contents(golden)
    before, after = (json.loads((path / "config.json").read_text()) for path in (golden, tmp_path / "out"))
    assert {key: after[key] for key in before.keys() & after.keys() - {"architectures", "torch_dtype"}} == {
        key: before[key] for key in before.keys() & after.keys() - {"architectures", "torch_dtype"}
    }
    assert after["torch_dtype"] == "bfloat16"
    assert ModelConfig.from_hf(after) == ModelConfig.from_hf(before)


def test_to_transformers_layout_and_back_is_identical(model, tmp_path):
    with pytest.warns(UserWarning, match="rotates all 16 channels"):
        save_pretrained(model, tmp_path / "out", layout="transformers")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "minimax"
    again = from_pretrained(tmp_path / "out")
    assert again.config == model.config
    same_parameters(again, model)


EXPERTS_CUT = P(None, ("expert", "fsdp"), "tensor", None)


@pytest.mark.parametrize(
    ("spec", "cut"),
    [
        ("fsdp=8", P(None, "expert", ("tensor", "fsdp"), None)),  # there are fewer experts
        ("expert=2,tensor=2,fsdp=2", EXPERTS_CUT),
        ("data=2,expert=4", EXPERTS_CUT),
        ("tensor=2,sequence=2,data=-1", EXPERTS_CUT),
    ],
)
def test_loads_onto_a_mesh_and_saves_from_it(model, golden, tmp_path, spec, cut):
    mesh = make_mesh(spec)
    sharded = from_pretrained(golden, mesh=mesh)
    same_parameters(sharded, model)
    w1 = sharded.runs[0].moe.w1[...]
    assert w1.sharding.mesh == mesh
    assert w1.sharding.spec == cut
    save_pretrained(sharded, tmp_path / "out", dtype=jnp.bfloat16)
    assert contents(tmp_path / "out") == contents(golden)


def test_a_shared_expert_and_other_patterns_round_trip(tmp_path):
    config = dataclasses.replace(
        ModelConfig.preset("m1-tiny"), layer_types=("softmax", "lightning") * 2, shared_intermediate_size=24
    )
    model = MiniMaxM1(config, rngs=nnx.Rngs(1))
    save_pretrained(model, tmp_path / "out")
    assert "model.layers.3.shared_mlp.down_proj.weight" in contents(tmp_path / "out")
    again = from_pretrained(tmp_path / "out")
    assert again.config == config
    same_parameters(again, model)
    with pytest.raises(UserError, match="has no shared expert"):
        save_pretrained(model, tmp_path / "other", layout="transformers")


def test_an_export_is_replaced_but_nothing_else(model, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer/photo.jpg").write_text("")
    for dtype in (jnp.float32, jnp.bfloat16):
        save_pretrained(model, tmp_path / "out", dtype=dtype, tokenizer_from=tmp_path / "tokenizer")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tokenizer"]
    with pytest.raises(UserError, match="holds something else than a model"):
        save_pretrained(model, tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer/photo.jpg").exists()


def test_an_export_names_its_end_token(model, tmp_path):
    tokenizer = Tokenizer.tiny()
    save_pretrained(model, tmp_path / "out", tokenizer=tokenizer)
    values = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert values["eos_token_id"] == tokenizer.eos_id
    assert Tokenizer.from_dir(tmp_path / "out").vocab_size == tokenizer.vocab_size
    save_pretrained(model, tmp_path / "again", tokenizer_from=tmp_path / "out")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == values


@pytest.mark.parametrize(
    ("config", "beside"),
    [
        ('{"command": "train sft"}', "metrics.jsonl"),
        ('{"model_type": "llama"}', "model.safetensors"),
        (None, "notes.md"),
    ],
    ids=["a run", "another model", "our export with notes in it"],
)
def test_a_config_json_alone_makes_no_export(model, tmp_path, config, beside):
    if config is None:
        save_pretrained(model, tmp_path / "out")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/config.json").write_text(config)
    (tmp_path / "out" / beside).write_text("precious")
    with pytest.raises(UserError, match="holds something else than a model"):
        save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / beside).read_text() == "precious"


@pytest.mark.parametrize("target", ["empty", "export", "nothing"])
def test_a_link_to_a_directory_stays_one(model, tmp_path, target):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.parent.mkdir()
    if target == "empty":
        real.mkdir()
    elif target == "export":
        save_pretrained(model, real)
    link.symlink_to(real)
    save_pretrained(model, link, dtype=jnp.bfloat16)
    assert link.is_symlink()
    assert [path.name for path in real.parent.iterdir()] == ["real"]
    assert from_pretrained(link).config == model.config


def test_a_mounted_disk_is_not_replaced(model):
    with pytest.raises(UserError, match="disk is mounted"):
        save_pretrained(model, "/")


def test_other_libraries_read_what_we_write(model, tmp_path):
    from safetensors.numpy import load_file

    save_pretrained(model, tmp_path / "out")
    read = load_file(tmp_path / "out/model.safetensors")
    assert {name: x.tobytes() for name, x in read.items()} == {n: c[2] for n, c in contents(tmp_path / "out").items()}
