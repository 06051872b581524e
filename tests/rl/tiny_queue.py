"""Reinforcement learning alone, with a window of the queue and generation beside training. The tests kill it."""

from pathlib import Path

from flax import nnx

from m1jax import MiniMaxM1
from m1jax.chat import Tokenizer
from m1jax.rl.recipe import EvaluationRecipe, GenerationRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.tasks import get_task
from m1jax.rl.trainer import Trainer
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run
from tests.rl.tiny_run import CONFIG, judge

# A checkpoint after every update: each second one lies in the middle of a batch, with the next one in flight. The
# repetition stop makes lengths differ, so that some responses are cut off and go on.
RECIPE = RLRecipe(
    optimizer=OptimizerConfig(learning_rate=1e-2),
    generation=GenerationRecipe(
        prompts=2,
        samples=2,
        rounds=4,
        fifo_window=4,
        max_prompt_tokens=24,
        max_new_tokens=24,
        repetition_tokens=1,
        repetition_probability=0.01,
        chat=False,
    ),
    update=UpdateRecipe(updates=2, row_length=48, rows=2),
    evaluation=EvaluationRecipe(evaluate_every=4, evaluate_rounds=1),
    staleness=1,
    iterations=4,
    checkpoint_every=1,
)


def train(directory: Path) -> MiniMaxM1:
    run, model = Run(directory, {"rl": RECIPE}), MiniMaxM1(CONFIG, rngs=nnx.Rngs(0))
    model = Trainer(run, model, get_task("sums+board"), Tokenizer.tiny(), RECIPE, seed=0, judge=judge).train()
    run.log.close()
    return model
