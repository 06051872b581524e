"""What compiled programs communicate, and that it is what sharding.py promises."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from m1jax import sharding
from m1jax.collectives import Collective, collectives, totals


def test_collectives_are_counted_through_loops():
    mesh = sharding.make_mesh("data=4,tensor=2")

    def work(x):
        def step(carry, _):
            return jax.lax.psum(carry, "data") / 4, jax.lax.all_gather(carry, "tensor", tiled=True).sum()

        carry, sums = jax.lax.scan(step, x, length=5)
        return carry + sums.sum()

    program = jax.shard_map(work, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    listed = collectives(jax.jit(program).lower(jnp.ones((16, 8))).compile())
    assert Collective("all-gather", "f32[32,8]", 2, 5, 5 * 32 * 8 * 4) in listed
    assert Collective("all-reduce", "f32[16,8]", 4, 5, 5 * 16 * 8 * 4) in listed
    assert totals(listed)["all-gather"] == (5, 5 * 32 * 8 * 4)


def test_one_device_communicates_nothing():
    assert collectives(jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile()) == []


@pytest.mark.parametrize("spec", ["fsdp=8"])
def test_weights_are_gathered_one_by_one(small, spec):
    """Each matrix when it is used, for the forward pass and again for the backward pass; never several at once."""
    mesh = sharding.make_mesh(spec)
    placed = sharding.parameter_shardings(small.params, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(small.loss_fn), out_shardings=placed)
        program = step.lower(
            jax.device_put(small.params, placed), jax.device_put(small.batch, sharding.batch_sharding(mesh))
        ).compile()
    weights = [x.size * 4 for x in jax.tree.leaves(small.params)]
    gathered = [c for c in collectives(program) if c.kind == "all-gather"]
    assert max(c.bytes / c.count for c in gathered) <= max(weights)
    # Twice for blocks, once for embedding and head, plus activations' odds and ends.
    assert sum(weights) * 0.8 < sum(c.bytes for c in gathered) < 2.2 * sum(weights)


GPU = """HloModule step, is_scheduled=true

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %g = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %h = ((bf16[8]{0}, f32[8,2]{1,0}), (bf16[2]{0}, f32[2,2]{1,0})) reduce-scatter-start(%y), replica_groups={{0,1,2,3}}
  %r = (f32[8]{0}, f32[4]{0}) all-reduce-start(%a, %b), replica_groups={{0,1},{2,3}}
  %p = (s32[3]{0}, s32[3]{0}, u32[], u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}
}
"""


def test_asynchronous_collectives_of_a_gpu():
    found = collectives(SimpleNamespace(as_text=lambda: GPU))
    assert {(c.kind, c.shape, c.devices): c.bytes for c in found} == {
        ("all-gather", "bf16[8,4]", 4): 64,
        ("reduce-scatter", "bf16[2]", 4): 16,
        ("reduce-scatter", "f32[2,2]", 4): 64,
        ("all-reduce", "f32[8]", 2): 32,
        ("all-reduce", "f32[4]", 2): 16,
        ("collective-permute", "s32[3]", 2): 12,
    }
