"""Wrong or damaged directories: one error that names file and tensor, and nothing half-written."""

import json
import struct

import numpy as np
import pytest

from m1jax import UserError, from_pretrained, save_pretrained
from m1jax.weights import safetensors as files
from m1jax.weights.safetensors import Plan, Weights, Writer

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q = "model.layers.7.self_attn.q_proj.weight"


def edit(file, change):
    """Rewrites the JSON header of a safetensors file."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (length - len(text))
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_json(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def resave(directory, change):
    """The golden tensors, changed, as one file without an index."""
    weights = Weights(directory)
    tensors = {name: np.array(weights.array(name)) for name in weights.entries}
    change(tensors)
    for file in (FIRST, SECOND, files.INDEX):
        (directory / file).unlink()
    plan = Plan((name, x.shape, x.dtype) for name, x in tensors.items())
    with Writer(directory, plan) as writer:
        for name, x in tensors.items():
            writer.write(name, x)
        writer.finish()


def fill(name, value):
    def change(tensors):
        tensors[name].reshape(-1)[5] = value

    return lambda d: resave(d, change)


CASES = {
    "missing shard": (lambda d: (d / SECOND).unlink(), rf"{SECOND}: cannot be read \(No such file"),
    "truncated shard": (
        lambda d: (d / FIRST).write_bytes((d / FIRST).read_bytes()[:-1]),
        rf"{FIRST}: truncated: [\d,]+ bytes instead of",
    ),
    "empty shard": (lambda d: (d / FIRST).write_bytes(b""), f"{FIRST}: truncated, or no safetensors file"),
    "no safetensors": (lambda d: (d / FIRST).write_bytes(b"<html>" * 99), "no safetensors file"),
    "damaged header": (
        lambda d: (d / FIRST).write_bytes((d / FIRST).read_bytes().replace(b'"dtype"', b'"dtyp}"', 1)),
        f"{FIRST}: its safetensors header is damaged",
    ),
    "shape and bytes disagree": (
        lambda d: edit(d / SECOND, lambda h: h[Q].update(shape=[1, 3])),
        rf"{Q} \[1, 3\] BF16 does not fill its",
    ),
    "offsets that are no integers": (
        lambda d: edit(d / SECOND, lambda h: h[Q].update(data_offsets=["0", "9"])),
        rf"{SECOND}: its safetensors header is damaged \(at {Q}\)",
    ),
    "tensors on top of each other": (
        lambda d: edit(d / SECOND, lambda h: h[Q].update(data_offsets=h[Q.replace("q_", "o_")]["data_offsets"])),
        rf"{SECOND}: its safetensors header is damaged \(.* overlap\)",
    ),
    "unknown dtype": (lambda d: edit(d / SECOND, lambda h: h[Q].update(dtype="I4")), f"{Q} has dtype I4; known are"),
    "index promises more": (
        lambda d: edit_json(d / files.INDEX, lambda i: i["weight_map"].update({"model.extra": FIRST})),
        f"{FIRST} lacks model.extra, which the index promises",
    ),
    "index knows less": (
        lambda d: edit_json(d / files.INDEX, lambda i: i["weight_map"].pop(Q)),
        f"{SECOND} holds {Q}, which the index does not know",
    ),
    "index without a map": (lambda d: (d / files.INDEX).write_text("{}"), "no weight_map"),
    "index no JSON": (lambda d: (d / files.INDEX).write_text("{"), rf"{files.INDEX}: not JSON"),
    "path in the index": (
        lambda d: edit_json(d / files.INDEX, lambda i: i["weight_map"].update({Q: "../x.safetensors"})),
        "is no plain file name",
    ),
    "missing tensor": (lambda d: resave(d, lambda t: t.pop(Q)), f"missing {Q}"),
    "unknown tensor": (
        lambda d: resave(d, lambda t: t.update({"model.layers.0.mlp.weight": np.zeros(3, np.float32)})),
        "unknown tensor model.layers.0.mlp.weight",
    ),
    "wrong shape": (
        lambda d: resave(d, lambda t: t.update({Q: t[Q][:, :-1]})),
        rf"{Q} is \[64, 47\], the config says \[64, 48\]",
    ),
    "many at once": (
        lambda d: resave(d, lambda t: [t.pop(n) for n in list(t) if "experts.1." in n]),
        "missing model.layers.0.block_sparse_moe.experts.1.w1.weight; missing .*; and 21 more",
    ),
    "NaN": (fill(Q, np.nan), f"NaN or infinity in {Q}; the file is damaged"),
    "infinity": (fill("lm_head.weight", np.inf), "NaN or infinity in lm_head.weight"),
    "another model": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(model_type="llama")),
        r"config.json: config: model_type is 'llama'.*another model's directory\?",
    ),
    "other experts": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(num_local_experts=5)),
        r"missing model.layers.0.block_sparse_moe.experts.4.w1.weight; .* more",
    ),
    "no config": (
        lambda d: (d / "config.json").unlink(),
        r"config.json: cannot be read .*is this a model's directory\?",
    ),
    "no weights": (
        lambda d: [p.unlink() for p in d.glob("model*")],
        f"neither {files.INDEX} nor {files.SINGLE} is there",
    ),
}


@pytest.mark.parametrize(("damage", "message"), CASES.values(), ids=CASES)
def test_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as error:
        from_pretrained(copy)
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


def test_decay_tables_of_transformers_are_passed_over(copy):
    resave(copy, lambda t: t.update({"model.layers.0.self_attn.slope_rate": np.zeros((4, 1, 1), np.float32)}))
    from_pretrained(copy)


def test_a_full_disk_leaves_nothing_that_looks_whole(golden, tmp_path, monkeypatch):
    model = from_pretrained(golden)
    save_pretrained(model, tmp_path / "earlier")
    before = (tmp_path / "earlier" / files.SINGLE).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in ("ftruncate", "pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr("os." + call, full)
            for name in ("new", "earlier"):
                with pytest.raises(UserError, match="the disk is full"):
                    save_pretrained(model, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["earlier"]
    assert (tmp_path / "earlier" / files.SINGLE).read_bytes() == before
