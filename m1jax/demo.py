"""`m1jax demo`: a small M1 from random weights to solved tasks, in minutes on two cores.

First a warm start on demonstrations (SFT): at its beginning most solutions think step by step, so that the model learns
the steps; at its end most answer straight away. A model this small cannot find these answers in its head, so after SFT
it mostly guesses. Then reinforcement learning (CISPO) with nothing but the rule that checks the answer: the model finds
out by itself that thinking pays, and to think without slips. Its responses grow longer and right.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
from flax import nnx
from rich.console import Console

from m1jax.chat import Tokenizer
from m1jax.config import ModelConfig
from m1jax.errors import require_seed
from m1jax.model import MiniMaxM1
from m1jax.rl.command import finish
from m1jax.rl.recipe import EvaluationRecipe, GenerationRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.tasks import get_task
from m1jax.rl.trainer import PHASE, Trainer
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run, run_directory
from m1jax.train.sft import Pair, SFTRecipe, sft

PRESET = "m1-demo"
TASK = "sums+board"
THINKING_SHARES = (0.6, 0.15)
"""of the demonstrations think step by step: of the first and of the last, with a straight line between"""
SFT = SFTRecipe(
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=200, final_fraction=0.1),
    steps=1800,
    batch=64,
    row_length=96,
    rows=16,
    checkpoint_every=250,
    log_every=25,
)
RL = RLRecipe(
    optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=16, final_fraction=0.1),
    generation=GenerationRecipe(prompts=64, samples=8, rounds=2, max_prompt_tokens=14, max_new_tokens=16, chat=False),
    update=UpdateRecipe(updates=16, row_length=96, rows=16),
    evaluation=EvaluationRecipe(evaluate_every=4, evaluate_rounds=4),
    iterations=16,
    checkpoint_every=120,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a small M1 from random weights: SFT warm start, then CISPO, on two families of problems.

    Takes minutes on two cores. Interrupted, by whatever, it goes on where it was when started again.
    """

    name: str = "demo"
    """The results go to RUNS/NAME."""
    runs: Path = Path("runs")
    seed: int = 0
    """Of the weights, the problems and the sampling."""


def main(config: Config) -> None:
    """Trains; RUNS/NAME then holds what `m1jax train rl` leaves: checkpoints, metrics, curves, samples, the model."""
    require_seed(config.seed)
    directory = run_directory(config.runs, config.name)
    console = Console(highlight=False, soft_wrap=True)
    tokenizer, task = Tokenizer.tiny(), get_task(TASK)
    model_config = ModelConfig.preset(PRESET)
    run = Run(
        directory,
        {
            "command": "demo",
            "seed": config.seed,
            "task": TASK,
            "thinking_shares": THINKING_SHARES,
            "model_config": model_config,
            "sft": SFT,
            "rl": RL,
        },
    )
    model = MiniMaxM1(model_config, rngs=nnx.Rngs(config.seed))
    console.print(f"{PRESET} trains on {TASK}; everything goes to {run.directory}/")

    start = time.monotonic()
    model = warm_start(run, model, config.seed)
    model = Trainer(run, model, task, tokenizer, RL, config.seed).train()
    here = time.monotonic() - start
    finish(run, model, tokenizer)
    records = run.log.of(PHASE)
    before, after = records[0], records[-1]
    trained = run.log.of("sft")[-1]["seconds"] + after["seconds"]
    console.print(
        f"held-out reward {before['heldout_reward']:.3f} -> {after['heldout_reward']:.3f}, "
        f"right answers {before['heldout_accuracy']:.1%} -> {after['heldout_accuracy']:.1%}, "
        f"length {before['heldout_length']:.1f} -> {after['heldout_length']:.1f} tokens"
    )
    console.print(f"training took {trained / 60:.1f} minutes ({here / 60:.1f} of them now)")
    console.print(f"see {run.directory}/curves.png, samples_before.md and samples_after.md, and let the model answer:")
    console.print(f'  m1jax generate {run.directory}/export --prompt "+3815962470=" --temperature 0')


def warm_start(run: Run, model: MiniMaxM1, seed: int) -> MiniMaxM1:
    """Trains the model on demonstrations; interrupted, it goes on from the run's checkpoint."""
    tokenizer, task = Tokenizer.tiny(), get_task(TASK)

    def pair(number: int) -> Pair:
        # Index apart from the RL problems' by the seed; held-out problems are apart by construction (rl/tasks/base.py).
        problem = task.problem("train", seed + 1_000_000, number)
        rng = np.random.default_rng([seed, number])
        think = rng.random() < np.interp(number, (0, SFT.steps * SFT.batch), THINKING_SHARES)
        return tokenizer.encode(problem.prompt), [*tokenizer.encode(problem.demonstration(think)), tokenizer.eos_id]

    return sft(run, model, pair, SFT)
