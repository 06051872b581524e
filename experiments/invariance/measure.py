"""Does the way a batch is computed change what is computed?

    python -m experiments.invariance.measure

The same 24 responses, cut into micro-batches, packed, rematerialised and spread over devices in different ways: loss
and gradients of the CISPO loss against one reference, in float32 on CPU. Prints the table of README.md.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
from flax import nnx

from m1jax.config import ModelConfig
from m1jax.model import MiniMaxM1
from m1jax.rl.prepare import example
from m1jax.rl.trainer import rl_loss
from m1jax.rl.types import Episode, RLBatch
from m1jax.sharding import make_mesh, parameter_shardings, rows_of_batch
from m1jax.train import packing
from m1jax.train.step import accumulate

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    layer_types=("lightning", "lightning", "lightning", "softmax"),
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    rotary_dim=8,
    num_experts=4,
    experts_per_token=2,
    initializer_range=0.1,
)
ROW = 64


def responses() -> list[RLBatch]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 48, 24)
    total = int(lengths.sum())
    found = []
    for n in lengths:
        episode = Episode(
            prompt=rng.integers(0, CONFIG.vocab_size, 8).astype(np.int32),
            tokens=rng.integers(0, CONFIG.vocab_size, n).astype(np.int32),
            written=np.ones(n, bool),
            logp=rng.normal(-5.5, 0.1, n).astype(np.float32),
            version=np.zeros(n, np.int32),
            turns=("",),
            finish="stop",
        )
        found.append(example(episode, advantage=float(rng.normal()), weight=1 / total))
    return found


def gradients(packed: RLBatch, *, rows: int, remat: bool = False, mesh: str = "") -> tuple[float, list[np.ndarray]]:
    """Loss and gradients with `rows` rows to a micro-batch."""
    graph, params = nnx.split(MiniMaxM1(CONFIG, rngs=nnx.Rngs(0)))
    batches = packing.micro_batches(packed, rows)
    loss_fn = rl_loss(graph, max_weight=5.0, remat=remat)
    here = make_mesh(mesh)
    with jax.set_mesh(here):
        params = jax.device_put(params, parameter_shardings(params, here))
        count = len(batches.tokens)
        batch = RLBatch(**rows_of_batch(batches.fields(), rows, here))
        grads, loss, _ = jax.jit(lambda p, b: accumulate(loss_fn, p, b, count))(params, batch)
    return float(loss), [np.asarray(g) for g in jax.tree.leaves(grads)]


def main() -> None:
    """Prints the table."""
    examples = responses()
    packed = packing.pack(examples, ROW)
    rows = 8 * -(-len(packed.tokens) // 8)
    one_a_row = packing.pack(examples, max(e.positions for e in examples))
    order = np.random.default_rng(1).permutation(len(packed.tokens))
    shuffled = packed.map(lambda x: x[order])
    alone = _unpacked(examples)
    reference = gradients(packed, rows=rows)
    print("| what differs | loss, relative | gradients: worst tensor, relative norm |\n|---|---|---|")
    cases = {
        f"micro-batches of {rows // 2} rows": dict(packed=packed, rows=rows // 2),
        "micro-batches of 2 rows": dict(packed=packed, rows=2),
        "micro-batches of 1 row": dict(packed=packed, rows=1),
        "rows in another order": dict(packed=shuffled, rows=rows),
        "other row length (other neighbours)": dict(packed=one_a_row, rows=8),
        "not packed: one response to a row": dict(packed=alone, rows=8),
        "every layer rematerialised": dict(packed=packed, rows=rows, remat=True),
        "8 devices: data=8": dict(packed=packed, rows=rows, mesh="data=8"),
        "8 devices: fsdp=8": dict(packed=packed, rows=rows, mesh="fsdp=8"),
        "8 devices: fsdp=2,expert=2,tensor=2": dict(packed=packed, rows=rows, mesh="fsdp=2,expert=2,tensor=2"),
        "8 devices: sequence=4,tensor=2": dict(packed=packed, rows=rows, mesh="sequence=4,tensor=2"),
    }
    for name, case in cases.items():
        loss, grads = gradients(**case)
        worst = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(grads, reference[1]))
        print(f"| {name} | {abs(loss - reference[0]) / abs(reference[0]):.1e} | {worst:.1e} |", flush=True)


def _unpacked(examples: list[RLBatch]) -> RLBatch:
    rows = [packing.pack([example], ROW) for example in examples]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


if __name__ == "__main__":
    main()
