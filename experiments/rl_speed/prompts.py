"""Loss and gradient of a group whose prompt is computed once, beside rows of whole sequences, on CPU.

A prompt of 4096 tokens and 8 responses of 512; the model of `rl_speed`. Run:
    python -m experiments.rl_speed.prompts
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.rl_speed.rl_speed import MODEL
from m1jax import MiniMaxM1
from m1jax.rl.conventions import CONVENTIONS
from m1jax.rl.prepare import prepare
from m1jax.rl.recipe import GenerationRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.tasks import Problem
from m1jax.rl.trainer import rl_loss
from m1jax.rl.types import Episode, Group, RLBatch, Scored
from m1jax.train.step import accumulate

PROMPT, ANSWER, SAMPLES = 4096, 512, 8
OUT = Path(__file__).parent / "prompts.json"


def scored() -> Scored:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 256, PROMPT).astype(np.int32)
    rewards = rng.normal(size=SAMPLES).astype(np.float32)
    episodes = tuple(
        Episode(
            prompt=prompt,
            tokens=rng.integers(0, 256, ANSWER).astype(np.int32),
            written=np.ones(ANSWER, bool),
            logp=rng.normal(-5.5, 0.1, ANSWER).astype(np.float32),
            version=np.zeros(ANSWER, np.int32),
            turns=("",),
            finish="length",
        )
        for _ in range(SAMPLES)
    )
    group = Group(Problem("", ""), episodes)
    return Scored(group=group, raw=rewards, rewards=rewards, parts={}, correct=rewards > 0)


def batch(share_prompts: bool) -> RLBatch:
    recipe = RLRecipe(
        generation=GenerationRecipe(
            prompts=1, samples=SAMPLES, max_prompt_tokens=PROMPT, max_new_tokens=ANSWER, chat=False
        ),
        update=UpdateRecipe(updates=1, row_length=PROMPT + ANSWER, rows=SAMPLES, share_prompts=share_prompts),
    )
    (update,) = prepare([scored()], recipe).remaining(0)
    return update


def main(repeat: int = 3) -> None:
    config = dataclasses.replace(MODEL, max_position_embeddings=8192)
    graph, params = nnx.split(MiniMaxM1(config, rngs=nnx.Rngs(0)))
    loss_fn = rl_loss(graph, CONVENTIONS["paper"].objective)
    run = jax.jit(lambda params, batch: accumulate(loss_fn, params, batch, 1)[:2])
    batches = {"whole": batch(False), "shared": batch(True)}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    found = {}
    for turn in range(repeat + 1):
        for name, given in batches.items():
            begin = time.perf_counter()
            found[name] = jax.block_until_ready(run(params, given))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - begin)
    (grads, loss), (want, want_loss) = found["shared"], found["whole"]
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(want)))
    largest = max(float(jnp.abs(b).max()) for _, b in pairs)
    result = {
        "seconds": {name: min(s) for name, s in seconds.items()},
        "faster": min(seconds["whole"]) / min(seconds["shared"]),
        "loss": [float(want_loss), float(loss)],
        "largest_gradient_difference": max(float(jnp.abs(a - b).max()) for a, b in pairs) / largest,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
