"""A whole training in seconds, in a process of its own: SFT, then RL, of a model of two layers. The tests kill it."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, save_pretrained
from m1jax.chat import Tokenizer
from m1jax.checkpoint import Checkpoints
from m1jax.rl import experience
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.recipe import (
    EvaluationRecipe,
    GenerationRecipe,
    LateRecipe,
    LossRecipe,
    RewardRecipe,
    RLRecipe,
    UpdateRecipe,
)
from m1jax.rl.rewards import Verdict
from m1jax.rl.tasks import Problem, get_task
from m1jax.rl.trainer import Trainer
from m1jax.rl.types import Episode
from m1jax.rl.window import WindowRecipe
from m1jax.train.metrics import MetricsLog
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run
from m1jax.train.session import Session
from m1jax.train.sft import SFTRecipe, sft

CONFIG = ModelConfig(
    vocab_size=263,
    hidden_size=16,
    intermediate_size=16,
    layer_types=("lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=2,
    experts_per_token=1,
    initializer_range=0.1,
)
SFT = SFTRecipe(
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    steps=10,
    batch=4,
    row_length=64,
    rows=2,
    checkpoint_every=4,
    log_every=3,
)
# 3 does not divide 4 updates, so that checkpoints fall into the middle of generation batches. Everything that has a
# state of its own is on: batches in flight, surplus groups, retired problems, a growing window, other policies.
RL = RLRecipe(
    optimizer=OptimizerConfig(learning_rate=1e-2),
    generation=GenerationRecipe(
        prompts=4,
        samples=4,
        rounds=2,
        keep_surplus=True,
        retire_above=0.5,
        max_prompt_tokens=24,
        max_new_tokens=16,
        chat=False,
    ),
    window=WindowRecipe(windows=(12, 16), window_batches=2, window_tolerance=1.0, window_nearness=0.1),
    loss=LossRecipe(old_policy="trainer", correction="truncated", kl_coefficient=0.1),
    late=LateRecipe(late_from=2, late_clip_norm=0.5, late_max_weight=2.0),
    staleness=1,
    reward=RewardRecipe(overlong_buffer=8),
    update=UpdateRecipe(updates=4, row_length=40, rows=4, replay_routes=True),
    evaluation=EvaluationRecipe(evaluate_every=2, evaluate_rounds=1),
    iterations=4,
    checkpoint_every=3,
)


def judge(problem: Problem, episode: Episode) -> Verdict:
    """The share of even bytes, so that every batch has some advantages: so small a model is never
    right. What is called right here makes problems retire."""
    share = float(np.mean(episode.tokens % 2 == 0)) * (problem.answer[-1] != "0")
    return Verdict(share, 0.0, share > 0.5)


def train(directory: Path) -> MiniMaxM1:
    task, tokenizer = get_task("sums+board"), Tokenizer.tiny()

    def pair(number: int) -> tuple[list[int], list[int]]:
        problem = task.problem("train", 1, number)
        response = problem.demonstration(bool(np.random.default_rng(number).integers(2)))
        return tokenizer.encode(problem.prompt), [*tokenizer.encode(response), tokenizer.eos_id]

    run = Run(directory, {"sft": SFT, "rl": RL})
    model = sft(run, MiniMaxM1(CONFIG, rngs=nnx.Rngs(0)), pair, SFT)
    model = Trainer(run, model, task, tokenizer, RL, seed=0, judge=judge).train()
    run.log.close()
    return model


MOMENTS = {
    "record": [(Checkpoints, "save"), (MetricsLog, "append")],
    "update": [(Session, "update")],
    "judge": [(experience, "score")],
    "write": [(EngineGenerator, "step")],
}
"""what happens often enough to be killed in"""


def kill_at(moment: str, number: int, delay: float) -> None:
    """SIGKILL to this process, ``delay`` seconds after the ``number``th ``moment`` began."""
    count = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return function(*args, **kwargs)

        return wrapper

    for owner, name in MOMENTS[moment]:
        setattr(owner, name, counted(getattr(owner, name)))


def program(
    train: Callable[[Path], MiniMaxM1], directory: Path, said: Path, kill: tuple[str, int, float] | None
) -> None:
    """Trains, writes the model into ``directory / "export"`` and all that is printed into ``said``."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if kill is not None:
        kill_at(*kill)
    save_pretrained(train(directory), directory / "export")
