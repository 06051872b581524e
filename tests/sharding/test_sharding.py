"""Meshes from one line, refusals, and the table of PartitionSpecs."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from m1jax import sharding
from m1jax.config import PRESETS, ModelConfig
from m1jax.errors import UserError
from m1jax.model import MiniMaxM1

M1 = ModelConfig.preset("m1-456b")


def test_a_mesh_has_all_axes():
    mesh = sharding.make_mesh("fsdp=4, tensor=2")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2, "sequence": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.make_mesh("data=-1,tensor=2").shape["data"] == 4
    assert sharding.make_mesh("").size == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fdsp=8", "axis 'fdsp' is unknown; there are data, fsdp"),
        ("data=2,data=4", "'data' is given twice"),
        ("data=0", "size of data must be a positive number"),
        ("data", "size of data must be a positive number or -1, not ''"),
        ("data=-1,fsdp=-1", "only one axis may be -1"),
        ("data=4", "is for 4 devices, but there are 8"),
        ("data=-1,tensor=3", "3 does not divide the 8 devices"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(spec)


@pytest.mark.parametrize(
    ("sizes", "batch", "time", "message"),
    [
        ({"tensor": 6}, None, None, r"tensor = 6 cannot.*num_heads = 64; the nearest that work: 4 or 8"),
        ({"tensor": 16}, None, None, r"tensor = 16.*num_kv_heads = 8; the nearest that work: 8$"),
        ({"expert": 5}, None, None, r"expert = 5.*num_experts = 32; the nearest that work: 4 or 8"),
        ({"fsdp": 7}, None, None, r"fsdp = 7.*hidden_size = 6144; the nearest that work: 6 or 8"),
        ({"fsdp": 1024, "expert": 4}, None, None, r"expert = 4.*hidden_size = 6144 \(fsdp x expert = 4096\).*: 2$"),
        (
            {"tensor": 4, "sequence": 32},
            None,
            None,
            r"sequence = 32.*num_heads = 64 \(tensor x sequence = 128\).*: 16$",
        ),
        ({"data": 6}, 8, None, r"data = 6.*the batch = 8; the nearest that work: 4 or 8"),
        ({"sequence": 16}, None, 1000, r"sequence = 16.*the time = 1000; the nearest that work: 8$"),
    ],
)
def test_what_cannot_shard_is_refused(sizes, batch, time, message):
    with pytest.raises(UserError, match=message):
        sharding.check_shardable(M1, dict.fromkeys(sharding.AXES, 1) | sizes, batch=batch, time=time)


def test_what_can_shard_passes():
    sizes = dict(zip(sharding.AXES, (2, 16, 8, 4, 4)))
    sharding.check_shardable(M1, sizes, batch=256, time=2**20)
    sharding.check_shardable(M1, sharding.make_mesh("fsdp=8"))


@pytest.mark.parametrize("shared", [0, 64])
@pytest.mark.parametrize("name", ["m1-456b", "m1-tiny"])
def test_every_parameter_and_moment_has_a_spec(name, shared):
    config = dataclasses.replace(PRESETS[name], shared_intermediate_size=shared)
    params = nnx.split(nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0))))[1]
    sizes = dict.fromkeys(sharding.AXES, 1)
    specs = sharding.parameter_specs(params, sizes)
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    assert [len(spec) for spec in leaves] == [leaf.ndim for leaf in jax.tree.leaves(params)]
    moments = sharding.parameter_specs(jax.eval_shape(optax.adamw(1e-3).init, params), sizes)
    assert moments[0].count == P()
    assert moments[0].mu == specs
    assert moments[0].nu == specs


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match=r"layers\.0\.mystery is no parameter"):
        sharding.parameter_specs({"layers": [{"mystery": np.zeros((2, 2))}]}, {})


def test_a_vocabulary_that_tensor_does_not_divide_is_cut_by_columns():
    config = dataclasses.replace(M1, vocab_size=200_063)
    mesh = jax.sharding.AbstractMesh((1, 16, 8, 4, 1), sharding.AXES)
    sharding.check_shardable(config, dict(mesh.shape))
    table = {"embed_tokens": jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), np.float32)}
    spec = sharding.parameter_specs(table, mesh.shape)["embed_tokens"]
    assert jax.sharding.NamedSharding(mesh, spec).shard_shape(table["embed_tokens"].shape) == (200_063, 6144 // 512)
    with pytest.raises(UserError, match=r"tensor = 2.*hidden_size = 6 \(tensor x fsdp = 4\)"):
        sharding.check_shardable(
            dataclasses.replace(config, hidden_size=6), dict.fromkeys(sharding.AXES, 1) | {"fsdp": 2, "tensor": 2}
        )


def test_456b_is_cut_evenly_over_a_pod():
    """No parameter of any size is repeated: each of 512 devices holds its share and little more."""
    mesh = jax.sharding.AbstractMesh((1, 16, 8, 4, 1), sharding.AXES)
    params = nnx.split(nnx.eval_shape(lambda: MiniMaxM1(M1, rngs=nnx.Rngs(0))))[1]
    held = whole = 0
    for leaf, spec in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(sharding.parameter_specs(params, mesh.shape), is_leaf=lambda x: isinstance(x, P)),
    ):
        held += np.prod(jax.sharding.NamedSharding(mesh, spec).shard_shape(leaf.shape), dtype=float)
        whole += np.prod(leaf.shape, dtype=float)
    assert whole == 456_089_655_296
    assert held < whole / 512 * 1.03


@pytest.mark.parametrize(
    ("sizes", "w1", "w2", "table"),
    [
        ({"fsdp": 4, "expert": 2}, (("expert", "fsdp"), "tensor", None), (("expert", "fsdp"), None, "tensor"), 0),
        ({"fsdp": 16, "expert": 8}, ("expert", ("tensor", "fsdp"), None), ("expert", "fsdp", "tensor"), 0),
        ({"fsdp": 256}, ("expert", ("tensor", "fsdp"), None), ("expert", "fsdp", "tensor"), 1),
    ],
)
def test_a_matrix_is_cut_along_its_first_dimension_that_can_be(sizes, w1, w2, table):
    params = nnx.split(nnx.eval_shape(lambda: MiniMaxM1(M1, rngs=nnx.Rngs(0))))[1]
    specs = sharding.parameter_specs(params, dict.fromkeys(sharding.AXES, 1) | sizes)
    moe = specs["runs"][0]["moe"]
    assert (moe["w1"].get_value(), moe["w2"].get_value()) == (P(None, *w1), P(None, *w2))
    words = specs["embed_tokens"].get_value()
    assert words == (P(("tensor", *sharding.CUT), None) if table == 0 else P("tensor", sharding.CUT))


def test_an_empty_array_is_cut_as_what_is_written_into_it():
    mesh = sharding.make_mesh("fsdp=8")

    def fill(x):
        def put(i, rows):
            return jax.lax.dynamic_update_index_in_dim(rows, x + i, i, 0)

        return jax.lax.fori_loop(0, 3, put, sharding.empty((3, 16), np.float32))

    x = jax.device_put(np.arange(16, dtype=np.float32), jax.sharding.NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        program = jax.jit(fill).lower(x).compile()
    np.testing.assert_array_equal(program(x), np.arange(16) + np.arange(3)[:, None])
    assert "f32[3,2]" in program.as_text()
    assert "f32[3,16]" not in program.as_text()


def test_constrain_without_a_mesh_changes_nothing():
    x = np.ones((2, 3))
    assert sharding.constrain(x, "batch", "time") is x
