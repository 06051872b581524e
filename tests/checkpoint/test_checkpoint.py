"""Checkpoints come back to the bit, on any mesh, or are refused with their damage named."""

import dataclasses
import errno
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from m1jax import MiniMaxM1, ModelConfig, UserError
from m1jax.checkpoint import Checkpoints
from m1jax.commands import checkpoint as inspect
from m1jax.weights.safetensors import Weights

ROOT = Path(__file__).parents[2]

CONFIG = dataclasses.replace(
    ModelConfig.preset("m1-tiny"),
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    layer_types=("lightning", "softmax") * 2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
)


@pytest.fixture(scope="module")
def params():
    return nnx.split(MiniMaxM1(CONFIG, rngs=nnx.Rngs(0)))[1]


@pytest.fixture
def state(params):
    return {
        "optimizer": optax.adamw(1e-3).init(params),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), 3),
        "old_key": jax.random.PRNGKey(3),
        "count": jnp.int32(5),
        "python": 12,
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf], jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "host": np.arange(4, dtype=np.float64),
    }


def bits(x):
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), np.asarray(jax.random.key_data(x)).tobytes()
    x = np.asarray(x)
    return str(x.dtype), x.shape, x.tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y)


def mesh(*shape):
    names = ("fsdp", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def placed(params, devices):
    """Every matrix sharded over two of its axes, where they divide."""

    def place(x):
        spec = [None] * x.ndim
        for axis, name in zip((-1, -2), devices.axis_names):
            if x.ndim >= -axis + 1 and x.shape[axis] % devices.shape[name] == 0:
                spec[axis] = name
        return jax.device_put(x, NamedSharding(devices, PartitionSpec(*spec)))

    return jax.tree.map(place, params)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_everything_comes_back_to_the_bit(tmp_path, params, state):
    arrays = {
        "rollout": {"tokens": np.arange(12).reshape(3, 4), "logp": np.ones(3, jnp.bfloat16), "none": np.zeros((0, 2))},
        "words": np.array(["a", "longer"]),
        "flag": np.array(True),
    }
    meta = {"big": 2**127 + 1, "float": 0.1, "list": [1, None, "ü"], "nested": {"x": [1.5]}}
    with Checkpoints(tmp_path / "new", config=CONFIG) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(params=params) is None
        checkpoints.save(3, params=params, state=state, arrays=arrays, meta=meta, metrics={"reward": 0.25})
    found = Checkpoints(tmp_path / "new", config=CONFIG).restore(params=params, state=state)
    assert found is not None
    assert found.step == 3
    assert_same(found.params, params)
    assert_same(found.state, state)
    assert_same(found.arrays, arrays)
    assert found.meta == meta
    assert found.metrics == {"reward": 0.25}
    assert isinstance(found.state["python"], int)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found.params))  # mixes with arrays on any mesh


def test_names_on_disk_are_official_and_one_per_layer(tmp_path, params):
    checkpoints = Checkpoints(tmp_path, config=CONFIG, asynchronous=False)
    checkpoints.save(1, params=params)
    names = checkpoints.info(1).params
    assert names["model.layers.3.self_attn.q_proj.weight"] == ["float32", [16, 16]]
    assert names["model.layers.2.block_sparse_moe.experts.w1.weight"] == ["float32", [4, 24, 16]]
    assert len(names) == 3 + 4 * (2 + 4 + 1 + 3)


@pytest.mark.parametrize("shapes", [((8,), (2, 4)), ((4, 2), (8,)), ((2, 2), ())], ids=str)
def test_restores_onto_any_mesh_and_dtype(tmp_path, params, shapes):
    before = placed(params, mesh(*shapes[0]))
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    checkpoints.save(1, params=before, state={"m": before})
    target = abstract(placed(params, mesh(*shapes[1]))) if shapes[1] else params
    found = checkpoints.restore(params=target, state={"m": target})
    assert found is not None
    for tree in (found.params, found.state["m"]):
        assert_same(jax.tree.map(np.asarray, tree), jax.tree.map(np.asarray, params))
        if shapes[1]:
            assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(target)))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), before)
    found = checkpoints.restore(params=half)
    assert found is not None
    assert_same(found.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_values_may_be_donated_while_they_are_written(tmp_path):
    before = np.arange(1 << 22, dtype=np.float32)
    x = jnp.array(before)
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    buffer = np.arange(10)
    checkpoints.save(1, state={"x": x}, arrays={"buffer": buffer})
    x = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(x)
    buffer[:] = -1
    jax.block_until_ready(x)
    found = checkpoints.restore(state={"x": x})
    assert found is not None
    assert_same(found.state["x"], before)
    assert_same(found.arrays["buffer"], np.arange(10))


def test_keeps_the_newest_and_the_best(tmp_path):
    with Checkpoints(tmp_path, config=CONFIG, keep=2, best="reward") as checkpoints:
        for step, reward in enumerate([0.1, 0.9, 0.3, 0.2, float("nan")]):
            checkpoints.save(step, state={"x": jnp.float32(step)}, metrics={"reward": reward})
    assert checkpoints.steps() == [1, 3, 4]
    assert checkpoints.best() == 1
    assert checkpoints.latest() == 4
    found = checkpoints.restore(state={"x": jnp.float32(0)}, step=1)
    assert found is not None
    assert float(found.state["x"]) == 1


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    for value in (1.0, 2.0):
        checkpoints.save(5, state={"x": jnp.float32(value)})
    found = checkpoints.restore(state={"x": jnp.float32(0)})
    assert found is not None
    assert float(found.state["x"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5"]


def truncate(path):
    data = max((p for p in path.rglob("*") if p.is_file() and p.parent.name == "d"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-3])


def flip(path):
    data = max((p for p in path.rglob("*") if p.is_file() and p.parent.name == "d"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def edit_manifest(path):
    file = path / "checkpoint.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))


DAMAGE = {
    "truncated": truncate,
    "one bit": flip,
    "a missing file": lambda path: (path / "arrays.npz").unlink(),
    "no manifest": lambda path: (path / "checkpoint.json").unlink(),
    "edited manifest": edit_manifest,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_one_is_named_and_the_one_before_used(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    state = {"x": jnp.arange(100.0)}
    for step in (1, 2):
        checkpoints.save(step, state={"x": state["x"] + step}, arrays={"a": np.ones(3)})
    checkpoints.wait()
    damage(tmp_path / "2")
    with caplog.at_level(logging.WARNING):
        found = checkpoints.restore(state=state)
    assert found is not None
    assert found.step == 1
    assert f"{tmp_path / '2'} is damaged" in caplog.text
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(state=state, step=2)
    checkpoints.save(2, state=state)  # the run goes on over it
    assert checkpoints.restore(state=state).step == 2  # pyright: ignore[reportOptionalMemberAccess]


def test_if_none_is_whole_nothing_starts_anew_silently(tmp_path):
    checkpoints = Checkpoints(tmp_path, config=CONFIG, asynchronous=False)
    checkpoints.save(1, state={"x": jnp.zeros(3)})
    truncate(tmp_path / "1")
    with pytest.raises(UserError, match="none of the checkpoints 1 is whole"):
        checkpoints.restore(state={"x": jnp.zeros(3)})


def test_an_interrupted_save_is_ignored_and_removed(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    checkpoints.save(1, state={"x": jnp.zeros(3)})
    checkpoints.wait()
    (tmp_path / "2.partial" / "tree").mkdir(parents=True)
    (tmp_path / "1").rename(tmp_path / "1.replaced")  # killed between the two renames of a step saved again
    assert checkpoints.steps() == []
    checkpoints.save(3, state={"x": jnp.zeros(3)})
    checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]
    (tmp_path / "4.partial").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore(state={"x": jnp.zeros(3)}).step == 3  # pyright: ignore[reportOptionalMemberAccess]
    assert "4.partial is an interrupted save" in caplog.text


def test_another_config_is_refused_naming_what_differs(tmp_path, params):
    Checkpoints(tmp_path, config=CONFIG, asynchronous=False).save(1, params=params)
    other = dataclasses.replace(CONFIG, num_experts=8, rope_theta=1e4)
    with pytest.raises(UserError, match=r"another model: .*num_experts is 4 there, 8 here"):
        Checkpoints(tmp_path, config=other).restore(params=params)


def test_another_state_is_refused_naming_what_differs(tmp_path):
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    checkpoints.save(1, state={"x": jnp.zeros(3), "y": jnp.zeros(2)})
    with pytest.raises(UserError, match=r"y is only there; z is only here; x is \[3\] there, \[4\] here"):
        checkpoints.restore(state={"x": jnp.zeros(4), "z": jnp.zeros(2)})
    with pytest.raises(UserError, match="holds other parameters"):
        checkpoints.restore(params=nnx.split(MiniMaxM1(CONFIG, rngs=nnx.Rngs(0)))[1])


def test_meta_that_json_cannot_hold_fails_at_once(tmp_path):
    with pytest.raises(TypeError):
        Checkpoints(tmp_path, config=CONFIG).save(1, meta={"x": object()})
    assert not any(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, config=CONFIG, asynchronous=False)
    checkpoints.save(1, state={"x": jnp.zeros(3)})
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 4 kB, 10 B are free. Nothing was written; saved and whole: 1"):
        checkpoints.save(2, state={"x": jnp.zeros(1000)})
    assert json.loads(json.dumps(checkpoints.steps())) == [1]


def test_a_directory_that_is_moved_is_not_made_anew(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "sft", config=CONFIG, asynchronous=False)
    checkpoints.save(1, state={"x": jnp.zeros(3)})
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="sft was moved or removed while it was written to"):
        checkpoints.save(2, state={"x": jnp.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    (tmp_path / "moved").rename(tmp_path / "run")
    checkpoints.save(2, state={"x": jnp.zeros(3)})
    assert checkpoints.steps() == [1, 2]


def test_nor_one_that_is_moved_while_it_is_written(tmp_path, monkeypatch):
    begin = ocp.save_checkpointables_async

    def moved(*args, **kwargs):
        (tmp_path / "run").rename(tmp_path / "moved")
        return begin(*args, **kwargs)

    checkpoints = Checkpoints(tmp_path / "run" / "sft", config=CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save_checkpointables_async", moved)
        checkpoints.save(1, state={"x": jnp.zeros(3)})
        with pytest.raises(UserError, match="sft was moved or removed while it was written to"):
            checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_arrays_are_on_disk_before_they_are_a_checkpoint(tmp_path, monkeypatch):
    """Every file that this package writes itself, and the names of all."""
    synced, fsync = set(), os.fsync

    def noted(descriptor):
        if not (tmp_path / "1").exists():  # later is too late
            synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    checkpoints = Checkpoints(tmp_path, config=CONFIG, asynchronous=False)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", noted)
        checkpoints.save(1, arrays={"a": np.ones(3)})
    assert {"arrays.npz", "checkpoint.json", "1.partial"} <= synced


@pytest.mark.parametrize("kind", ["ENOSPC", "EDQUOT", "EACCES", "EROFS"])
def test_what_the_disk_refuses_is_told_and_nothing_is_lost(tmp_path, monkeypatch, kind):
    checkpoints = Checkpoints(tmp_path, config=CONFIG, asynchronous=False)
    checkpoints.save(1, state={"x": jnp.zeros(3)})
    number = getattr(errno, kind)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "2.partial" / "arrays.npz"))

    says = "the disk is full" if kind in ("ENOSPC", "EDQUOT") else "not permitted"
    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez", refuse)
        with pytest.raises(UserError, match=rf"arrays.npz: {says}.* step 2 was not saved. Saved and whole: 1"):
            checkpoints.save(2, state={"x": jnp.zeros(3)}, arrays={"a": np.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert checkpoints.restore(state={"x": jnp.zeros(3)}).step == 1  # pyright: ignore[reportOptionalMemberAccess]


PROCESS = """
import sys
index, count, directory, spec, port = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
import jax
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("localhost:" + port, count, index)
import jax.numpy as jnp, numpy as np
from flax import nnx
from m1jax import from_pretrained, save_pretrained
from m1jax.checkpoint import Checkpoints
from m1jax.sharding import make_mesh

model = from_pretrained("tests/golden/m1-tiny", mesh=make_mesh(spec))
params = nnx.split(model)[1]
state = {"m": params, "key": jax.random.key(count), "n": jnp.int32(4)}
with Checkpoints(directory, config=model.config) as checkpoints:
    found = checkpoints.restore(params=params, state=state)
    if found is None:
        checkpoints.save(3, params=params, state=state, arrays={"b": np.arange(5)}, meta=count)
        save_pretrained(model, directory + "-export", dtype=jnp.bfloat16)
    else:
        for tree in (found.params, found.state["m"]):
            for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
                assert x.sharding == y.sharding
                for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
                    assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        assert (found.step, found.meta, int(found.state["n"]), found.arrays["b"].tolist()) == (3, 2, 4, [0, 1, 2, 3, 4])
        assert jax.random.key_data(found.state["key"]).tolist() == jax.random.key_data(jax.random.key(2)).tolist()
"""


@pytest.mark.slow
def test_written_by_two_processes_restored_by_one_two_and_four(tmp_path):
    for count, spec in [(2, "fsdp=2,expert=2"), (1, "tensor=2,data=2"), (2, "expert=4"), (4, "fsdp=4")]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(index), str(count), str(tmp_path / "run"), spec, port],
                env=os.environ | flags | {"PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
        for process in started:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    golden, export = Weights(ROOT / "tests/golden/m1-tiny"), Weights(tmp_path / "run-export")
    assert golden.entries.keys() == export.entries.keys()
    assert all(golden.array(name).tobytes() == export.array(name).tobytes() for name in golden.entries)


def test_ls_show_verify(tmp_path, params, capsys):
    directory = tmp_path / "run" / "checkpoints" / "sft"
    with Checkpoints(directory, config=CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, params=params, arrays={"a": np.ones(3)}, meta={"seed": 5}, metrics={"reward": 0.5})
    inspect.ls(inspect.ListConfig(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "params (43), arrays (1)" in out
    assert out.count("reward 0.5  complete") == 2
    inspect.show(inspect.ShowConfig(tmp_path / "run", tensors=True))
    out = capsys.readouterr().out
    assert "step 2, saved" in out
    assert "num_experts = 4" in out
    assert "seed = 5" in out
    assert "params  lm_head.weight  float32  [32, 16]" in out
    inspect.verify(inspect.VerifyConfig(directory))
    assert capsys.readouterr().out.count("complete") == 2
    flip(directory / "2")
    with pytest.raises(UserError, match=r"damaged: .*sft/2: the contents of tree/params"):
        inspect.verify(inspect.VerifyConfig(tmp_path / "run"))
    truncate(directory / "2")
    inspect.ls(inspect.ListConfig(directory))
    assert "damaged: tree/params" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no checkpoints"):
            inspect.ls(inspect.ListConfig(wrong))
