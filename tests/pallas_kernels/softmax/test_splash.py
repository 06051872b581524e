"""Splash attention in Pallas' interpreter on CPU; test_splash_compiled.py compiles it for TPUs that are not here."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from pallas_kernels import softmax_attention
from pallas_kernels.softmax import splash
from tests.pallas_kernels.softmax.suite import Suite


class TestSplash(Suite):
    implementation = "splash"
    options: ClassVar = {"interpret": True}
    dtypes: ClassVar = ("bfloat16",)
    check_vma: ClassVar = False

    def bears(self, case):
        return case.starts is None and case.length > 1


def test_tables_of_a_small_mask_are_those_of_the_whole():
    length, block = 1024, 128
    whole = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * 3),
        block_sizes=splash._block_sizes(block),
        head_shards=1,
        q_seq_shards=1,
    )
    small = splash._kernel(3, length // block, block, False)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.fixture
def for_tpu(monkeypatch):
    monkeypatch.setattr(splash.target, "target_platform", lambda: "tpu")


@pytest.mark.usefixtures("for_tpu")
def test_says_why_not():
    q = jnp.zeros((2, 8, 2, 64), jnp.bfloat16)
    for changes, message in [
        ({"q": jnp.zeros((2, 8, 2, 64))}, "takes bfloat16"),
        ({"q": jnp.zeros((2, 8, 2, 96), jnp.bfloat16)}, "takes heads of size 64, 128 or 256: got D = 96"),
        ({"q_start": jnp.zeros(2, jnp.int32)}, "takes no q_start"),
        ({"q": jax.ShapeDtypeStruct((1, 1 << 19, 2, 64), jnp.bfloat16)}, "takes up to 262144 tokens: got T = 524288"),
    ]:
        arrays = {name: changes.get("q", q) for name in "qkv"} | {k: x for k, x in changes.items() if k != "q"}
        with pytest.raises(ValueError, match=f"'splash' cannot run here: it {message}"):
            jax.eval_shape(lambda a: softmax_attention(**a, implementation="splash"), arrays)


@pytest.mark.usefixtures("for_tpu")
def test_says_that_shard_map_must_not_check():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def op(q):
        return softmax_attention(q, q, q, implementation="splash")

    with pytest.raises(ValueError, match="check_vma=False"):
        jax.eval_shape(
            jax.shard_map(op, mesh=mesh, in_specs=rows, out_specs=rows),
            jax.ShapeDtypeStruct((2, 8, 2, 64), jnp.bfloat16),
        )


def test_needs_a_tpu():
    q = jnp.zeros((2, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="needs a TPU, and this program is for cpu"):
        softmax_attention(q, q, q, implementation="splash")
