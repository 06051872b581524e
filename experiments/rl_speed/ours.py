"""Our side of `rl_speed`: MODEL RUN STEPS; prints a line of JSON for each step."""

import json
import sys
import time
from pathlib import Path

from experiments.rl_speed.rl_speed import LENGTH, PROMPTS, SAMPLES, Clock
from m1jax import from_pretrained
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.recipe import EvaluationRecipe, GenerationRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.rewards import Verdict
from m1jax.rl.tasks import Problem
from m1jax.rl.trainer import Trainer
from m1jax.rl.types import Episode
from m1jax.train.data import load_tokenizer
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run


class Numbers:
    """Prompts of ten characters."""

    name = "numbers"

    def problem(self, split: str, seed: int, index: int) -> Problem:
        return Problem(f"{index:010d}", "1")

    def correct(self, problem: Problem, answer: str) -> bool:
        return False


def judge(problem: Problem, episode: Episode) -> Verdict:
    """What makes every group differ."""
    return Verdict(float(episode.tokens.sum() % 101) / 101, 0.0, False)


def main(model: Path, directory: Path, steps: int) -> None:
    recipe = RLRecipe(
        optimizer=OptimizerConfig(learning_rate=1e-6),
        generation=GenerationRecipe(
            prompts=PROMPTS, samples=SAMPLES, rounds=1, max_prompt_tokens=10, max_new_tokens=LENGTH, chat=False
        ),
        update=UpdateRecipe(updates=1, row_length=84, rows=32),
        evaluation=EvaluationRecipe(evaluate_every=steps, evaluate_rounds=1),
        iterations=steps,
        checkpoint_every=steps,
    )
    clock = Clock()
    EngineGenerator.run = clock.around(EngineGenerator.run)
    run = Run(directory, {"recipe": recipe})
    trainer = Trainer(run, from_pretrained(model), Numbers(), load_tokenizer(model), recipe, 0, judge=judge)
    append, last = run.log.append, [time.perf_counter(), 0.0, time.process_time()]

    def noted(phase: str, step: int, values: dict[str, float]) -> None:
        append(phase, step, values)
        now, cpu = time.perf_counter(), time.process_time()
        if 0 < step < steps:  # the last one evaluates, too
            line = {"step": now - last[0], "generation": clock.seconds - last[1], "processor": cpu - last[2]}
            print(json.dumps({"number": step, **line}), flush=True)
        last[:] = [now, clock.seconds, cpu]

    run.log.append = noted  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
