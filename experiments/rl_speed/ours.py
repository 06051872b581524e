"""Our side of `rl_speed`: JOB as JSON; prints a line of JSON for each step."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments.rl_speed.job import Job
from m1jax import MiniMaxM1, from_pretrained
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.recipe import EvaluationRecipe, GenerationRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.rewards import Verdict
from m1jax.rl.stream import split
from m1jax.rl.tasks import Problem
from m1jax.rl.trainer import Trainer
from m1jax.rl.types import Episode
from m1jax.train import allocator, placement
from m1jax.train.data import load_tokenizer
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run
from m1jax.weights.directory import read_config

FIGURES = ("waiting_seconds", "sync_seconds", "sync_bytes", "staleness")
"""also printed, where they are there"""


class Numbers:
    """Prompts of so many characters."""

    name = "numbers"

    def __init__(self, length: int):
        self._length = length

    def problem(self, split: str, seed: int, index: int) -> Problem:
        return Problem(f"{index:0{self._length}d}", "1")

    def correct(self, problem: Problem, answer: str) -> bool:
        return False


def judge(problem: Problem, episode: Episode) -> Verdict:
    """What makes every group differ."""
    return Verdict(float(episode.tokens.sum() % 101) / 101, 0.0, False)


def recipe_of(job: Job) -> RLRecipe:
    sizes, further = job.sizes, job.steps + 1  # the last one evaluates and saves, and is not waited for
    return RLRecipe(
        optimizer=OptimizerConfig(learning_rate=1e-6),
        generation=GenerationRecipe(
            prompts=sizes.prompts,
            samples=sizes.samples,
            rounds=1,
            max_prompt_tokens=sizes.prompt_tokens,
            max_new_tokens=sizes.new_tokens,
            chat=False,
        ),
        update=UpdateRecipe(
            updates=sizes.updates, row_length=sizes.row_length, rows=sizes.rows, share_prompts=job.share_prompts
        ),
        evaluation=EvaluationRecipe(evaluate_every=further, evaluate_rounds=1),
        iterations=further,
        checkpoint_every=further * sizes.updates,
        staleness=job.staleness,
        generator_mesh=job.generator_mesh,
    )


def model_of(directory: Path) -> MiniMaxM1:
    if any(directory.glob("*.safetensors")):
        return from_pretrained(directory)
    config = read_config(directory)
    return jax.jit(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0)))()


class Enough(Exception):
    """All steps are made."""


class Clock:
    """Adds up the seconds of some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def main(job: Job) -> None:
    recipe, directory, clock = recipe_of(job), Path(job.model), Clock()
    if not job.keep_memory:
        allocator.keep_freed_memory = lambda: None
    EngineGenerator.run = clock.around(EngineGenerator.run)
    with placement.use_mesh(job.mesh, split(recipe.generator_mesh)[0]):
        run = Run(job.run, {"recipe": recipe})
        task = Numbers(job.sizes.prompt_tokens)
        trainer = Trainer(run, model_of(directory), task, load_tokenizer(directory), recipe, 0, judge=judge)
        append, last = run.log.append, [time.perf_counter(), 0.0, time.process_time()]

        def noted(phase: str, step: int, values: dict[str, float]) -> None:
            append(phase, step, values)
            now, cpu = time.perf_counter(), time.process_time()
            if step:
                line = {"step": now - last[0], "generation": clock.seconds - last[1], "processor": cpu - last[2]}
                line |= {name: values[name] for name in FIGURES if name in values}
                print(json.dumps({"number": step, **line}), flush=True)
            last[:] = [now, clock.seconds, cpu]
            if step == job.steps:
                raise Enough

        run.log.append = noted  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(Enough):
            trainer.train()


if __name__ == "__main__":
    main(Job.from_json(sys.argv[1]))
