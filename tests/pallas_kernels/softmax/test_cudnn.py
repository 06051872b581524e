"""cuDNN's attention: run where there is an NVIDIA GPU (JAX_PLATFORMS=cuda), else lowered for one."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels import softmax_attention
from pallas_kernels.softmax import cudnn
from tests.pallas_kernels.softmax.suite import Suite


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU (JAX_PLATFORMS=cuda)")
class TestCudnn(Suite):
    implementation = "cudnn"
    dtypes: ClassVar = ("bfloat16",)
    packed: ClassVar = False

    def bears(self, case):
        return case.rows is None and case.starts is None


@pytest.fixture
def for_gpu(monkeypatch):
    monkeypatch.setattr(cudnn.target, "target_platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "_is_ampere_or_later", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lowered(dtype, size=64, **where):
    q, k = (jnp.zeros((2, 100, heads, size), dtype) for heads in (4, 2))

    def gradients(q, k, v, where):
        return jax.grad(lambda *x: softmax_attention(*x, **where).astype("float32").sum(), (0, 1, 2))(q, k, v)

    return jax.jit(gradients).trace(q, k, k, where).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("for_gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_is_chosen_and_lowers_for_a_gpu(dtype):
    program = lowered(dtype)
    assert program.count("custom_call @__cudnn$fmhaSoftmax(") == 1
    assert program.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1
    assert "100x100" not in program


@pytest.mark.usefixtures("for_gpu")
def test_what_it_does_not_take_goes_to_the_portable_form():
    zeros = jnp.zeros(2, jnp.int32)
    for arguments in [
        {"dtype": "float32"},
        {"dtype": "bfloat16", "size": 36},
        {"dtype": "bfloat16", "segment_ids": jnp.zeros((2, 100), jnp.int32)},
        {"dtype": "bfloat16", "q_start": zeros},
    ]:
        assert "cudnn" not in lowered(**arguments)


@pytest.mark.usefixtures("for_gpu")
def test_says_why_not():
    q = jnp.zeros((2, 8, 2, 64), jnp.bfloat16)
    for arguments, message in [
        ({"q": jnp.zeros((2, 8, 2, 64))}, "takes bfloat16 or float16: got float32"),
        ({"q": jnp.zeros((2, 8, 2, 256), jnp.bfloat16)}, "up to 128 that is a multiple of 8: got D = 256"),
        ({"q": q, "segment_ids": jnp.zeros((2, 8), jnp.int32)}, "takes no segment_ids"),
        ({"q": q, "q_start": jnp.zeros(2, jnp.int32)}, "takes no q_start"),
    ]:
        x = arguments.pop("q")
        with pytest.raises(ValueError, match=f"'cudnn' cannot run here: it .*{message}"):
            softmax_attention(x, x, x, **arguments, implementation="cudnn")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="here is one")
def test_needs_a_gpu():
    q = jnp.zeros((2, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and this program is for cpu"):
        softmax_attention(q, q, q, implementation="cudnn")
