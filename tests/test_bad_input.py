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
from m1jax.errors import UserError
from m1jax.train.run import Run

CONFIG = dataclasses.replace(
    ModelConfig.preset("m1-tiny"), vocab_size=263, layer_types=("lightning", "softmax"), max_position_embeddings=64
)
GATE = "model.layers.0.block_sparse_moe.gate.weight"
HEAD = "lm_head.weight"
LOG_LINE = re.compile(r"WARNING: All log messages before absl|[IWE]\d{4} ")


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
    message = capsys.readouterr().err.strip()  # a progress bar may have left an empty line
    assert exit.value.code == 2, message
    assert "Traceback" not in message
    assert message.startswith("m1jax: ")
    assert message.count("\n") < 2, message
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
    "a prompt of bytes that are no UTF-8": (("--prompt", "caf\udce9"), "prompt 0: no valid Unicode at character 4"),
    "no seed": (("--prompt", "a", "--seed", "-1"), "seed = -1"),
    "no probability left": (("--prompt", "a", "--top-p", "0"), "top_p = 0"),
    "no samples": (("--prompt", "a", "--samples", "0"), "samples_per_prompt = 0"),
    "a system message without a chat": (("--prompt", "a", "--system", "b"), "--chat"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(good, capsys, case):
    arguments, says = GENERATE[case]
    arguments = ("--max-new-tokens", "4", *arguments) if "--max-new-tokens" not in arguments else arguments
    assert re.search("(?is)" + says, run(capsys, "generate", good, *arguments))


def test_a_tokenizer_of_another_model(directory, tmp_path, capsys):
    # One that knows more tokens than the model has embeddings: an id outside must not read some other row.
    edit(
        directory / "tokenizer.json",
        lambda t: t["added_tokens"].append(t["added_tokens"][-1] | {"id": 263, "content": "<extra>"}),
    )
    message = run(capsys, "generate", directory, "--prompt", "a<extra>", "--max-new-tokens", "4")
    assert re.search("token 263.*vocabulary has 263", message)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a<extra>", "answer": "b"}\n{"prompt": "b", "answer": "<extra>"}\n')
    for kind in ("sft", "rl", "pretrain"):  # under jit such an id would silently read another row
        message = run(capsys, "train", kind, directory, "--data", data, "--runs", tmp_path / "runs")
        assert re.search("has 264 tokens, the model's vocabulary 263", message)
    assert not (tmp_path / "runs").exists()


DATA = {
    "no such file": (None, "cannot be read"),
    "an empty file": (b"", "no lines"),
    "a line cut off": (b'{"prompt": "a", "answer": "b"}\n\n{"prompt": "a", "ans', "line 3, column"),
    "a line that is a list": (b'{"prompt": "a", "answer": "b"}\n["a", "b"]', "line 2: a list"),
    "a misspelt key": (b'{"prompt": "a", "answr": "b"}', "line 1: no 'answer'"),
    "an empty prompt": (b'{"prompt": "", "answer": "b"}', "line 1: 'prompt' is ''"),
    "an answer of null": (b'{"prompt": "a", "answer": null}', "line 1: 'answer' is None"),
    "Latin-1": (b'{"prompt": "caf\xe9", "answer": "b"}', "line 1: not UTF-8"),
    "half of an emoji": (b'{"prompt": "a\\ud83d", "answer": "b"}', "line 1: no valid Unicode at character 2"),
}


@pytest.mark.parametrize("command", ["sft", "rl"])
@pytest.mark.parametrize("case", DATA)
def test_training_data(good, tmp_path, capsys, command, case):
    content, says = DATA[case]
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    message = run(capsys, "train", command, good, "--data", path, "--runs", tmp_path / "runs")
    assert re.search(r"(?is)data\.jsonl.*" + says, message)
    assert not (tmp_path / "runs").exists()


TRAINING = {
    "neither data nor task": (("train", "rl"), "--data FILE.jsonl or --task"),
    "no such task": (("train", "rl", "--task", "nonsense"), "nonsense"),
    "one response has no advantage": (("train", "rl", "--task", "sums", "--samples", "1"), "samples = 1"),
    "no temperature": (("train", "rl", "--task", "sums", "--temperature", "0"), "temperature = 0"),
    "no problems": (("train", "rl", "--task", "sums", "--prompts", "0"), "prompts = 0"),
    "rows too short": (("train", "rl", "--task", "sums", "--row-length", "8"), "row_length = 8"),
    "more than the model's positions": (("train", "rl", "--task", "sums"), "max_position_embeddings = 64"),
    "no seed": (("train", "sft", "--data", "DATA", "--seed", "-1"), "seed = -1"),
    "no seed for RL": (("train", "rl", "--task", "sums", "--seed", "4294967296"), "seed = 4294967296"),
    "negative learning rate": (("train", "sft", "--data", "DATA", "--learning-rate", "-1"), "learning_rate = -1"),
    "no steps": (("train", "sft", "--data", "DATA", "--steps", "0"), "steps = 0"),
    "no batch": (("train", "sft", "--data", "DATA", "--batch", "0"), "batch = 0"),
    "a sequence too long": (("train", "sft", "--data", "DATA", "--row-length", "8"), "row_length.* 8"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_options(good, tmp_path, capsys, case):
    (kind, command, *options), says = TRAINING[case]
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is one and one?", "answer": "two"}\n{"prompt": "And two?", "answer": "four"}\n')
    options = [data if option == "DATA" else option for option in options]
    message = run(capsys, kind, command, good, *options, "--runs", tmp_path / "runs", "--name", "x")
    assert re.search("(?is)" + says, message)
    assert not list((tmp_path / "runs").glob("x/export*"))


def test_a_run_cannot_go_on_with_other_settings(tmp_path, capsys):
    started = Run(tmp_path / "runs" / "x", {"seed": 0})
    Run(tmp_path / "runs" / "x", {"seed": 1})  # nothing was saved yet
    (started.checkpoints_of("sft") / "10").mkdir(parents=True)
    with pytest.raises(UserError, match="seed is 1 there and 2 now"):
        Run(tmp_path / "runs" / "x", {"seed": 2})


def test_a_run_does_not_replace_a_model(directory, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    before = (directory / "config.json").read_text()
    place = ("--runs", tmp_path, "--name", directory.name)
    message = run(capsys, "train", "sft", directory, "--data", data, "--row-length", "32", *place)
    assert "holds a model" in message
    assert (directory / "config.json").read_text() == before


CONVERT = {
    "nothing there": (lambda d: ("nowhere", "target"), r"nowhere"),
    "onto itself": (lambda d: (d, d), "different directories"),
    "onto something else": (lambda d: (d, d.parent / "taken"), "taken"),
    "onto everything": (lambda d: (d, "/", "--to", "official"), "different directories"),
    "a form that only Transformers has": (lambda d: (d, "target", "--to", "official", "--experts", "merged"), "merged"),
    "no threads": (lambda d: (d, "target", "--threads", "0"), "threads"),
}


@pytest.mark.parametrize("case", CONVERT)
def test_convert(directory, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("precious")
    arguments, says = CONVERT[case]
    assert re.search(says, run(capsys, "convert", *arguments(directory)))
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / "target").exists()


def test_convert_a_damaged_model(directory, tmp_path, capsys):
    truncate(directory)
    assert "model-00002-of-00002" in run(capsys, "convert", directory, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("option", ["processes=0", "restarts=-1", "devices=0", "heartbeat=0", "patience=-1"])
def test_launch(capsys, option):
    name, value = option.split("=")
    message = run(capsys, "launch", f"--{name}", value, "--", "checkpoint", "ls", "runs")
    assert re.search(f"--processes|{name} = {value}", message)


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_checkpoint_commands_where_there_is_none(tmp_path, capsys, command):
    assert str(tmp_path) in run(capsys, "checkpoint", command, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_while_converting(good, small_disk, capsys):
    for kind in ("official", "orbax"):
        message = run(capsys, "convert", good, small_disk / kind, "--to", kind)
        assert re.search("(?i)disk|space|free", message)
        # Of checkpoints the directory above may be there, but no step in it.
        assert not list((small_disk / kind).glob("*[0-9]" if kind == "orbax" else "*"))
        for rest in small_disk.iterdir():
            shutil.rmtree(rest)


def test_a_full_disk_while_training(good, small_disk, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    options = ("--steps", "1", "--batch", "1", "--rows", "1", "--row-length", "16", "--runs", small_disk)
    message = run(capsys, "train", "sft", good, "--data", data, *options)
    assert re.search("(?i)disk|space|free", message)
    assert not list(small_disk.glob("sft/checkpoints/sft/*"))
    assert not (small_disk / "sft" / "export").exists()


def test_a_disk_that_is_read_only(good, tmp_path, capsys):
    data, place = tmp_path / "data.jsonl", tmp_path / "disk"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        for command in (("train", "sft", good, "--data", data, "--runs", place), ("convert", good, place / "out")):
            message = run(capsys, *command)
            assert re.search(f"{place}.*: this file system is read-only; choose another place", message)
            assert "remove" not in message
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


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
    # Where JAX's plugins for chips are installed (make kernels-toolchain), they report that there are none.
    ours = [line for line in done.stderr.strip().splitlines() if not LOG_LINE.match(line)]
    assert len(ours) <= 2, done.stderr
