"""The planner's bytes beside those of the compiler for TPUs; all cases are in experiments/plan_memory."""

import json

import pytest

from experiments.plan_memory.compare import CASES, HERE, case
from m1jax.collectives import collectives, totals
from m1jax.plan.memory import memory
from m1jax.plan.setup import Setup
from tests.pallas_kernels.tpu_topologies import require_libtpu


def check(name):
    from m1jax.plan.compile import compile_step, required_bytes, tpu_mesh

    require_libtpu()
    setup, topology = case(name)
    program = compile_step(setup, tpu_mesh(topology, CASES[name][1]))
    assert sum(memory(setup, "tpu").values()) == pytest.approx(required_bytes(program), rel=0.1)


@pytest.mark.parametrize("name", CASES)
def test_what_the_compiler_once_said(name):
    recorded = json.loads((HERE / "result.json").read_text())[name]["bytes"]
    assert sum(memory(case(name)[0], "tpu").values()) == pytest.approx(recorded, rel=0.1)


def test_decoding():
    check("m1-decode")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m1-prefill", "small-sft", "small-no-remat", "m1-rl"])
def test_other_tasks(name):
    check(name)


def small():
    """A relative of the 456 B model."""
    from m1jax.config import ModelConfig

    return ModelConfig(
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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,expert=4", "data=2,fsdp=4"])
def test_several_micro_batches(mesh):
    """XLA would move sums over devices out of their loop, and cannot where parameters are cut over all."""
    from m1jax.plan.compile import compile_step, tpu_mesh
    from m1jax.sharding import parse_mesh

    require_libtpu()
    setup = Setup(model=small(), task="sft", mesh=parse_mesh(mesh), context=512, rows=8, micro_batches=2)
    assert "while" in compile_step(setup, tpu_mesh("v5p:2x2x2", mesh)).as_text()


@pytest.mark.slow
def test_the_rl_update_has_all_its_parts():
    from m1jax.plan.compile import compile_step, required_bytes, tpu_mesh
    from m1jax.sharding import parse_mesh

    require_libtpu()
    mesh = "fsdp=2,expert=2,tensor=2"
    setup = Setup(model=small(), task="rl", mesh=parse_mesh(mesh), context=512, rows=4)
    program = compile_step(setup, tpu_mesh("v5p:2x2x2", mesh))
    found = totals(collectives(program))
    assert found["all-gather"][0] > 0
    assert found["reduce-scatter"][0] > 0
    assert "tpu_custom_call" in program.as_text()  # lightning attention is the kernel, not its portable form
    state = sum(memory(setup, "tpu")[kind] for kind in ("parameters", "optimizer"))
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(state, rel=0.05)
    assert required_bytes(program) > state
