"""What a user can get wrong: each ends in one or two lines that say what, where and what to do.

Here through the command line, as users meet it: exit status 2 and no traceback. The tests of the parts go further into
their own kinds of damage.
"""

import dataclasses
import json
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import m1jax
from m1jax import cli
from m1jax.chat import Tokenizer
from m1jax.config import ModelConfig

CONFIG = dataclasses.replace(
    ModelConfig.preset("m1-tiny"), vocab_size=263, layer_types=("lightning", "softmax"), max_position_embeddings=64
)
GATE = "model.layers.0.block_sparse_moe.gate.weight"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def model():
    return m1jax.MiniMaxM1(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    """A model's directory in the official layout with two shards."""
    directory = tmp_path_factory.mktemp("good") / "model"
    m1jax.save_pretrained(model, directory)
    Tokenizer.tiny().save(directory)
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
        path.unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def directory(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def edit(path, change):
    """Applies `change` to the object in a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_config(**changes):
    return lambda directory: edit(directory / "config.json", lambda config: config.update(changes))


def edit_index(change):
    return lambda directory: edit(directory / "model.safetensors.index.json", lambda index: change(index["weight_map"]))


def edit_tensors(change):
    """Applies `change` to the tensors of both shards, and keeps the index true."""

    def damage(directory):
        index_path = directory / "model.safetensors.index.json"
        index = json.loads(index_path.read_text())
        for path in sorted(directory.glob("*.safetensors")):
            tensors = safetensors.numpy.load_file(path)
            before = set(tensors)
            change(tensors)
            safetensors.numpy.save_file(tensors, path)
            for name in before - set(tensors):
                del index["weight_map"][name]
            index["weight_map"] |= dict.fromkeys(set(tensors) - before, path.name)
        index_path.write_text(json.dumps(index))

    return damage


def change_tensor(name, function):
    def change(tensors):
        if name in tensors:
            tensors[name] = function(tensors[name])

    return edit_tensors(change)


def truncate(directory):
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_header(directory):
    path = directory / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])


def with_value(value):
    def function(array):
        array = array.copy()
        array.flat[3] = value
        return array

    return function


MODEL_DIRECTORIES = {
    "no directory": (shutil.rmtree, r"model"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json"),
    "config cut off": (lambda d: (d / "config.json").write_text('{"model_type": '), r"config\.json"),
    "another model's config": (edit_config(model_type="llama"), r"llama.*minimax"),
    "no model_type": (lambda d: edit(d / "config.json", lambda c: c.pop("model_type")), r"model_type"),
    "keys of Transformers in an official config": (
        edit_config(mlp_alpha_factor=3.5),
        r"unknown key 'mlp_alpha_factor'",
    ),
    "official keys in a Transformers config": (
        edit_config(model_type="minimax"),
        r"attn_type_list|missing|unknown key",
    ),
    "a key is missing": (
        lambda d: edit(d / "config.json", lambda c: c.pop("layernorm_mlp_alpha")),
        r"layernorm_mlp_alpha",
    ),
    "layers do not add up": (edit_config(num_hidden_layers=3), r"num_hidden_layers = 3.*2 layer types"),
    "another activation": (edit_config(hidden_act="gelu"), r"hidden_act"),
    "tied embeddings": (edit_config(tie_word_embeddings=True), r"tie_word_embeddings"),
    "pre-norm": (edit_config(postnorm=False), r"postnorm"),
    "a value of the wrong type": (edit_config(hidden_size="48"), r"hidden_size"),
    "heads that do not divide": (edit_config(num_key_value_heads=3), r"num_kv_heads = 3"),
    "no weights": (lambda d: [p.unlink() for p in d.glob("*.safetensors*")], r"safetensors"),
    "a shard is missing": (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), r"model-00002-of-00002"),
    "a shard is truncated": (truncate, r"model-00002-of-00002"),
    "a shard's header is garbage": (spoil_header, r"model-00001-of-00002"),
    "index cut off": (lambda d: (d / "model.safetensors.index.json").write_text("{"), r"index\.json"),
    "index without a map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), r"weight_map"),
    "index sends to the wrong shard": (
        edit_index(
            lambda m: m.update({HEAD: "model-00001-of-00002.safetensors", GATE: "model-00002-of-00002.safetensors"})
        ),
        r"lm_head|gate",
    ),
    "wrong shape": (change_tensor(HEAD, lambda x: x[:-1]), r"lm_head\.weight.*262.*263"),
    "config of a wider sibling": (edit_config(intermediate_size=96), r"experts.*80.*96|experts.*96.*80"),
    "a tensor is missing": (edit_tensors(lambda t: t.pop(GATE, None)), r"gate"),
    "a tensor too many": (edit_tensors(lambda t: HEAD in t and t.update({"model.extra.weight": t[HEAD]})), r"extra"),
    "NaN": (change_tensor(HEAD, with_value(np.nan)), r"lm_head\.weight"),
    "infinity": (change_tensor(GATE, with_value(np.inf)), r"gate"),
    "integer weights": (change_tensor(HEAD, lambda x: x.astype(np.int8)), r"lm_head\.weight"),
}


def run(capsys, *arguments):
    """What `m1jax ARGUMENTS` says of bad input, after checking how it says it."""
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert exit.value.code == 2, message
    assert "Traceback" not in message
    assert message.startswith("m1jax: ")
    assert message.strip().count("\n") < 2, message
    assert 20 < len(message) < 600, message
    return message


@pytest.mark.parametrize("case", MODEL_DIRECTORIES)
def test_model_directories(directory, capsys, case):
    damage, says = MODEL_DIRECTORIES[case]
    damage(directory)
    assert re.search("(?is)" + says, run(capsys, "generate", directory, "--prompt", "hello"))


GENERATE = {
    "no prompt": ((), "--prompt"),
    "an empty prompt": (("--prompt", ""), "prompt 0 is empty"),
    "the context overflows": (("--prompt", "a" * 60, "--max-new-tokens", "5"), "60 tokens.*64 positions"),
    "no new tokens": (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens = 0"),
    "negative temperature": (("--prompt", "a", "--temperature", "-1"), "temperature = -1"),
    "a temperature that is no number": (("--prompt", "a", "--temperature", "nan"), "temperature = nan"),
    "no probability left": (("--prompt", "a", "--top-p", "0"), "top_p = 0"),
    "no samples": (("--prompt", "a", "--samples", "0"), "samples_per_prompt = 0"),
    "a system message without a chat": (("--prompt", "a", "--system", "b"), "--chat"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(good, capsys, case):
    arguments, says = GENERATE[case]
    arguments = ("--max-new-tokens", "4", *arguments) if "--max-new-tokens" not in arguments else arguments
    assert re.search("(?is)" + says, run(capsys, "generate", good, *arguments))


def test_a_tokenizer_of_another_model(directory, capsys):
    # One that knows more tokens than the model has embeddings: an id outside must not read some other row.
    edit(
        directory / "tokenizer.json",
        lambda t: t["added_tokens"].append(t["added_tokens"][-1] | {"id": 263, "content": "<extra>"}),
    )
    message = run(capsys, "generate", directory, "--prompt", "a<extra>", "--max-new-tokens", "4")
    assert re.search("token 263.*vocabulary has 263", message)


def test_the_process_ends_with_status_2_and_no_traceback(directory):
    truncate(directory)
    done = subprocess.run(
        [sys.executable, "-m", "m1jax.cli", "generate", str(directory), "--prompt", "hello"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "model-00002-of-00002" in done.stderr
    assert done.stderr.strip().count("\n") < 2, done.stderr
