"""A small relative of the 456 B update, with all its parts, through the compiler for TPUs."""

import importlib.util

import pytest

from m1jax.collectives import collectives, totals
from m1jax.config import ModelConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs: `make kernels-toolchain`"
)


@pytest.mark.slow
def test_the_rl_update_compiles_for_a_slice():
    from experiments.compile_456b.compile import compile_update, tpu_mesh

    config = ModelConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        layer_types=("lightning", "softmax") * 2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        rotary_dim=64,
        num_experts=4,
        experts_per_token=2,
    )
    compiled = compile_update(config, tpu_mesh("v5p:2x2x2", "fsdp=2,expert=2,tensor=2"), rows=4, length=512)
    found = totals(collectives(compiled))
    assert found["all-gather"][0] > 0
    assert found["reduce-scatter"][0] > 0
    assert "tpu_custom_call" in compiled.as_text()  # lightning attention is the kernel, not its portable form
    memory = compiled.memory_analysis()
    parameters = 4 * 2**20  # about: float32 parameters of one device, of 8.3 M in all
    assert 3 * 0.5 * parameters < memory.argument_size_in_bytes < 3 * 2 * parameters
