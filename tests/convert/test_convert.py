"""`m1jax convert`: every way between the three forms, exact to the byte, resumed after a kill, shared by processes."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, UserError, from_pretrained, save_pretrained
from m1jax.chat import Tokenizer
from m1jax.checkpoint import Checkpoints
from m1jax.commands import convert as command
from m1jax.convert import journal, pieces, stream
from m1jax.weights import safetensors as files
from m1jax.weights.names import tensors
from m1jax.weights.safetensors import Plan, Weights


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces per tensor and several files, as large models have."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)


@pytest.fixture(autouse=True)
def partial_rotary_is_known():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformers' minimax class will not reproduce")
        yield


def convert(src, dst, **options):
    command.main(command.Config(src, dst, **{"threads": 4, **options}))
    return dst


def contents(directory):
    weights = Weights(directory)
    return {name: (e.dtype, e.shape, weights.array(name).tobytes()) for name, e in weights.entries.items()}


def leftovers(path):
    return sorted(p.name for p in path.iterdir() if p.name.startswith("."))


@pytest.mark.parametrize(
    "via", [["transformers"], ["orbax"], ["orbax", "transformers"], ["transformers", "orbax"]], ids=str
)
def test_there_and_back_is_identical(golden, tmp_path, via):
    at = golden
    for number, kind in enumerate([*via, "official"]):
        at = convert(at, tmp_path / str(number), to=kind, shard_gb=3e-4)
    assert contents(at) == contents(golden)
    assert len(list(at.glob("*.safetensors"))) == 4
    before, after = (ModelConfig.from_hf(json.loads((path / "config.json").read_text())) for path in (golden, at))
    assert before == after
    assert not leftovers(tmp_path)


def test_a_checkpoint_made_by_conversion_restores(golden, tmp_path):
    convert(golden, tmp_path / "orbax")
    model = from_pretrained(golden, dtype=jnp.bfloat16)
    checkpoints = Checkpoints(tmp_path / "orbax", config=model.config)
    target = nnx.split(model)[1]
    found = checkpoints.restore(params=target)
    assert found is not None
    assert found.step == 0
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(target), strict=True):
        assert (x.dtype, np.asarray(x).tobytes()) == (y.dtype, np.asarray(y).tobytes())
    checkpoints.save(1, params=found.params)  # and a run goes on from it
    checkpoints.wait()
    assert checkpoints.steps() == [0, 1]


def test_a_checkpoint_of_a_run_becomes_files(golden, tmp_path):
    model = from_pretrained(golden)
    with Checkpoints(tmp_path / "run", config=model.config) as checkpoints:
        checkpoints.save(7, params=nnx.split(model)[1], state={"count": jnp.int32(7)})
    convert(tmp_path / "run", tmp_path / "float32")
    assert contents(tmp_path / "float32")["lm_head.weight"][0] == np.float32
    convert(tmp_path / "run" / "7", tmp_path / "bfloat16", dtype="bfloat16")
    assert contents(tmp_path / "bfloat16") == contents(golden)
    assert json.loads((tmp_path / "bfloat16/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_change_of_dtype_spares_the_router(golden, tmp_path):
    convert(golden, tmp_path / "half", to="official", dtype="float16")
    for name, (dtype, _, data) in contents(tmp_path / "half").items():
        router = name.endswith("gate.weight") and "moe" in name
        assert dtype == (np.float32 if router else np.float16)
        if not router:
            assert data == Weights(golden).array(name).astype(np.float16).tobytes()


def test_merged_experts_are_read_and_written(golden, tmp_path):
    convert(golden, tmp_path / "merged", to="transformers", experts="merged")
    names = contents(tmp_path / "merged")
    assert names["model.layers.3.mlp.experts.gate_up_proj"][1] == (4, 160, 48)
    assert not any("block_sparse_moe" in name for name in names)
    assert contents(convert(tmp_path / "merged", tmp_path / "back", to="official")) == contents(golden)
    with pytest.raises(UserError, match="needs --to transformers"):
        convert(golden, tmp_path / "x", to="official", experts="merged")


def test_transformers_writes_merged_experts_as_we_do(golden, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is an extra: make torch")
    transformers = pytest.importorskip("transformers", reason="Transformers is an extra: make torch")
    convert(golden, tmp_path / "split", to="transformers")
    convert(golden, tmp_path / "merged", to="transformers", experts="merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split, merged = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / k) for k in ("split", "merged"))
    for (name, x), y in zip(split.state_dict().items(), merged.state_dict().values(), strict=True):
        assert x.equal(y), name


def test_dry_run_of_the_published_model_reads_headers_only(tmp_path, capsys):
    """All 8,243 tensors of the 456 B model in sparse files: 912 GB by their lengths, megabytes on disk."""
    config = ModelConfig.preset("m1-456b")
    half = files.DTYPES["BF16"]
    plan = Plan((t.name, t.shape, np.dtype(np.float32) if t.router else half) for t in tensors(config))
    for name, header in plan.headers.items():
        with open(tmp_path / name, "wb") as file:
            file.write(header)
            file.truncate(plan.sizes[name])
    index = plan.index()
    assert index is not None
    (tmp_path / files.INDEX).write_bytes(index)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    pieces.PIECE_BYTES = 128 * 2**20
    for to in ("orbax", "transformers"):
        convert(tmp_path, tmp_path.with_name("never"), to=to, dry_run=True)
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 8244
        assert "8,243 tensors, 456,089,655,296 parameters, 912,210,767,872 bytes" in out
        assert "runs.1.moe.w2[9, 31]" in out
    assert not tmp_path.with_name("never").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from m1jax.commands import convert
from m1jax.convert import pieces, stream
pieces.PIECE_BYTES = 2000
copy, count = stream.copy_piece, int(sys.argv[4])
def counted(*args):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    copy(*args)
stream.copy_piece = counted
convert.main(convert.Config(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3], threads=2))
"""


@pytest.mark.parametrize("to", ["official", "orbax"])
def test_goes_on_after_sigkill(golden, tmp_path, to, monkeypatch):
    done = subprocess.run([sys.executable, "-c", KILLED, golden, tmp_path / "out", to, "200"], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "0").exists()
    copied = []
    copy = stream.copy_piece
    monkeypatch.setattr(stream, "copy_piece", lambda *args: (copied.append(args[1]), copy(*args)))
    convert(golden, tmp_path / "out", to=to)
    whole = sum(
        len(list(pieces.cut(t, np.dtype("f4") if t.router else files.DTYPES["BF16"]))) for t in tensors_of(golden)
    )
    assert whole - 200 <= len(copied) <= whole - 190
    back = tmp_path / "out" if to == "official" else convert(tmp_path / "out", tmp_path / "back", to="official")
    assert contents(back) == contents(golden)


def tensors_of(directory):
    return tensors(ModelConfig.from_hf(json.loads((directory / "config.json").read_text())))


def test_a_journal_of_another_source_is_not_continued(golden, copy, tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, copy, tmp_path / "out", "official", "200"], timeout=120)
    config = json.loads((copy / "config.json").read_text())
    weights = Weights(copy)
    changed = {name: np.array(weights.array(name)) for name in weights.entries}
    changed["model.embed_tokens.weight"] *= 2
    for entry in weights.entries.values():
        os.utime(entry.file, ns=(1, time.time_ns()))
    entry = weights.entries["model.embed_tokens.weight"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.start)
        file.write(changed["model.embed_tokens.weight"].tobytes())
    convert(copy, tmp_path / "out", to="official")
    assert contents(tmp_path / "out") == contents(copy)
    assert config["model_type"] == "minimax_m1"


@pytest.mark.parametrize("to", ["official", "orbax"])
def test_several_processes_share_the_work(golden, tmp_path, to):
    """In any order; process 0 puts the result together once all others are done."""
    for process in (2, 1):
        convert(golden, tmp_path / "out", to=to, process_index=process, process_count=3)
        assert not (tmp_path / "out/config.json").exists()
        assert not (tmp_path / "out/0").exists()
    convert(golden, tmp_path / "out", to=to, process_index=0, process_count=3)
    back = tmp_path / "out" if to == "official" else convert(tmp_path / "out", tmp_path / "back", to="official")
    assert contents(back) == contents(golden)


def test_a_byte_that_was_not_written_is_found(golden, tmp_path, monkeypatch):
    copy = stream.copy_piece

    def lossy(source, piece, dtype, descriptor):
        if piece.tensor.name != "lm_head.weight":
            copy(source, piece, dtype, descriptor)

    monkeypatch.setattr(stream, "copy_piece", lossy)
    with pytest.raises(UserError, match=r"lm_head.weight differs in model"):
        convert(golden, tmp_path / "out", to="official")
    assert not (tmp_path / "out").exists()


def test_nan_is_refused(copy, tmp_path):
    entry = Weights(copy).entries["lm_head.weight"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.start)
        file.write(np.array(np.nan, entry.dtype).tobytes())
    with pytest.raises(UserError, match=r"NaN or infinity in lm_head.weight; the conversion was not completed"):
        convert(copy, tmp_path / "out", to="official")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["official", "orbax"])
def test_what_the_dtype_cannot_hold_is_refused(copy, tmp_path, to):
    entry = Weights(copy).entries["lm_head.weight"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.start)
        file.write(np.array(1e6, entry.dtype).tobytes())
    with pytest.raises(UserError, match=r"values in lm_head.weight are too large for float16; the conversion was not"):
        convert(copy, tmp_path / "out", to=to, dtype="float16")
    assert not list((tmp_path / "out").glob("[0-9]" if to == "orbax" else "*"))
    with pytest.raises(UserError, match=r"lm_head.weight are too large for float16"):
        save_pretrained(from_pretrained(copy), tmp_path / "out2", dtype=np.float16)
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("size", [0, float("nan"), float("inf")])
def test_shards_have_a_size(golden, tmp_path, size):
    with pytest.raises(UserError, match="shard-gb"):
        convert(golden, tmp_path / "out", to="official", shard_gb=size)


def test_a_full_disk_keeps_what_is_done(golden, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"the disk is full: [0-9,]+ bytes are to be written, 1,000 are free"):
            convert(golden, tmp_path / "out", to="official")
    copy, left = stream.copy_piece, [100]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "copy_piece", full)
        with pytest.raises(UserError, match=r"the disk is full.*free some and start again"):
            convert(golden, tmp_path / "out", to="official")
    assert not (tmp_path / "out").exists()
    done = []
    monkeypatch.setattr(stream, "copy_piece", lambda *args: (done.append(1), copy(*args)))
    convert(golden, tmp_path / "out", to="official")
    assert contents(tmp_path / "out") == contents(golden)
    assert len(done) < 700


def test_targets_that_hold_something_are_refused(golden, copy, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_text("")
    for to in ("official", "orbax"):
        with pytest.raises(UserError, match="give the name of a new directory"):
            convert(golden, tmp_path / "photos", to=to)
        with pytest.raises(UserError, match="must be different directories"):
            convert(copy, copy, to=to)
    with pytest.raises(UserError, match="must lie below"):
        convert(golden, tmp_path / "x", process_index=2, process_count=2)


def test_a_damaged_checkpoint_as_source(tmp_path):
    config = dataclasses.replace(ModelConfig.preset("m1-tiny"), layer_types=("lightning", "softmax"))
    model = MiniMaxM1(config, rngs=nnx.Rngs(0))
    with Checkpoints(tmp_path / "run", config=config) as checkpoints:
        checkpoints.save(1, state={"x": jnp.zeros(2)})
        checkpoints.save(2, params=nnx.split(model)[1])
    with pytest.raises(UserError, match="holds no parameters"):
        convert(tmp_path / "run" / "1", tmp_path / "out")
    file = max((tmp_path / "run/2/tree/params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"the contents of .*{file.name} have changed since it was saved"):
        convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run/2/checkpoint.json").write_text("x")
    with pytest.raises(UserError, match="holds no parameters"):  # the one before, which is whole
        convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run/1/checkpoint.json").write_text("x")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        convert(tmp_path / "run", tmp_path / "out")


SMALL = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    layer_types=("lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rotary_dim=2,
    num_experts=2,
    experts_per_token=1,
)


@pytest.fixture
def small(tmp_path):
    """Files of a model with few tensors, that a test may damage."""
    save_pretrained(MiniMaxM1(SMALL, rngs=nnx.Rngs(0)), tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def at_once(monkeypatch):
    """Within: processes that give up were started together with those that see it, although they run in turn."""

    @contextlib.contextmanager
    def at_once():
        with monkeypatch.context() as patch:
            patch.setattr(journal, "LOOK_EVERY", 0.0)
            patch.setattr(journal, "PATIENCE", 0.0)
            yield

    return at_once


def convert_all(src, dst, count, **options):
    """Every process in turn, the first last; what each raised."""
    raised = {}
    for process in reversed(range(count)):
        try:
            convert(src, dst, process_index=process, process_count=count, **options)
        except UserError as error:
            raised[process] = str(error)
    return raised


@pytest.mark.parametrize("to", ["official", "orbax"])
def test_damage_seen_by_one_process_stops_all(small, tmp_path, to, at_once):
    entry = Weights(small).entries["lm_head.weight"]
    whole = entry.file.read_bytes()
    damaged = bytearray(whole)
    damaged[entry.start : entry.start + 4] = np.float32(np.nan).tobytes()
    entry.file.write_bytes(damaged)
    with at_once():
        raised = convert_all(small, tmp_path / "out", 3, to=to)
    (finder,) = (n for n, text in raised.items() if "gave up" not in text)
    assert f"{small}: NaN or infinity in lm_head.weight; the conversion was not completed" in raised[finder]
    assert 0 in raised  # and did not wait in vain
    others = [text for n, text in raised.items() if n != finder]
    assert all(f"process {finder} of 3 gave up: {small}: NaN or infinity" in text for text in others)
    entry.file.write_bytes(whole)
    assert not convert_all(small, tmp_path / "out", 3, to=to)
    back = tmp_path / "out" if to == "official" else convert(tmp_path / "out", tmp_path / "back", to="official")
    assert contents(back) == contents(small)


def test_a_damaged_checkpoint_stops_all_processes(small, tmp_path, at_once):
    convert(small, tmp_path / "orbax")
    file = max((tmp_path / "orbax/0/tree/params/lm_head.weight/c").rglob("*"), key=lambda path: path.is_file())
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with at_once():
        raised = convert_all(tmp_path / "orbax", tmp_path / "out", 2)
    assert 0 in raised
    assert sum("have changed since it was saved" in text and "gave up" not in text for text in raised.values()) == 1
    file.write_bytes(content)
    assert not convert_all(tmp_path / "orbax", tmp_path / "out", 2)
    assert contents(tmp_path / "out") == contents(small)


def test_a_full_disk_of_one_process_stops_all_and_keeps_what_is_done(small, tmp_path, at_once, monkeypatch):
    copy_piece, left = stream.copy_piece, [10]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        copy_piece(*args)

    with at_once(), monkeypatch.context() as patch:
        patch.setattr(stream, "copy_piece", full)
        raised = convert_all(small, tmp_path / "out", 2, to="official")
    assert "model.safetensors: the disk is full" in raised[1]
    assert "process 1 of 2 gave up" in raised[0] or "the disk is full" in raised[0]
    done = []
    monkeypatch.setattr(stream, "copy_piece", lambda *args: (done.append(1), copy_piece(*args)))
    assert not convert_all(small, tmp_path / "out", 2, to="official")
    assert contents(tmp_path / "out") == contents(small)
    assert len(done) == len(tensors(SMALL)) - 10


def spoil(file, how):
    if how == "truncated":
        os.truncate(file, 100)
    elif how == "overwritten":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        file.unlink()


@pytest.mark.parametrize("form", ["files", "checkpoint of a conversion", "checkpoint of a run"])
@pytest.mark.parametrize("how", ["truncated", "removed", "overwritten"])
def test_a_source_that_changes_while_it_is_verified_is_blamed(small, tmp_path, form, how, monkeypatch):
    """Were it read through a memory map, this process would not survive it."""
    source, out = tmp_path / "checkpoint", tmp_path / "out"
    if form == "files":
        source, file = small, small / files.SINGLE
    elif form == "checkpoint of a conversion":
        convert(small, source)
        (file,) = (path for path in (source / "0/tree/params/lm_head.weight/c").rglob("*") if path.is_file())
    else:
        with Checkpoints(source, config=SMALL) as checkpoints:
            checkpoints.save(1, params=nnx.split(MiniMaxM1(SMALL, rngs=nnx.Rngs(0)))[1])
        data = [path for path in (source / "1/tree/params").rglob("d/*") if path.is_file()]
        file = max(data, key=lambda path: path.stat().st_size)
    verify, left = stream.verify_piece, [1]

    def verify_after(*args):
        left[0] -= 1
        if left[0] == 0:
            spoil(file, how)
        return verify(*args)

    monkeypatch.setattr(stream, "verify_piece", verify_after)
    with pytest.raises(UserError, match=r"became shorter|cannot be read|changed while it was converted") as error:
        convert(source, out, to="official", threads=1)
    assert str(source) in str(error.value)
    assert str(out) not in str(error.value)
    assert not out.exists()


def test_a_run_means_its_newest_checkpoint_and_its_tokenizer(tmp_path, capsys):
    params = nnx.split(MiniMaxM1(SMALL, rngs=nnx.Rngs(0)))[1]
    run = tmp_path / "run"
    with pytest.raises(UserError, match="run"):
        convert(run, tmp_path / "none")
    for phase, step, values in (("sft", 7, params), ("rl", 6, jax.tree.map(lambda x: x + 1, params))):
        with Checkpoints(run / "checkpoints" / phase, config=SMALL) as checkpoints:
            checkpoints.save(step, params=values)
    (run / "config.json").write_text(json.dumps({"command": "train rl", "model": str(tmp_path / "model")}))
    Tokenizer.tiny().save(tmp_path / "model")
    for number, within in enumerate(["", "checkpoints", "checkpoints/rl", "checkpoints/rl/6"]):
        convert(run / within, tmp_path / str(number))
        assert contents(tmp_path / str(number)) == contents(tmp_path / "0")
        assert Tokenizer.from_dir(tmp_path / str(number)).eos_id == Tokenizer.tiny().eos_id
        assert (tmp_path / str(number) / "generation_config.json").exists()
    convert(run / "checkpoints/sft", tmp_path / "sft")
    assert contents(tmp_path / "sft") != contents(tmp_path / "0")
    (run / "checkpoints" / "empty").mkdir()
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoints"):
        convert(tmp_path / "new", tmp_path / "none")
