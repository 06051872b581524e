"""A small model learns to use tools, or to halve: SFT that mostly guesses, then CISPO (see README.md)."""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Literal

import grain
import jax
import numpy as np
import tokenizers
import tyro
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig
from m1jax.chat import Tokenizer
from m1jax.rl.recipe import EvaluationRecipe, GenerationRecipe, RewardRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.tasks import Problem, get_task
from m1jax.rl.tasks.guess import HIGHEST, GuessingGame
from m1jax.rl.tasks.shop import look_up
from m1jax.rl.trainer import PHASE, Trainer
from m1jax.train import packing
from m1jax.train.batch import Batch
from m1jax.train.data import ENDLESS
from m1jax.train.loop import fit
from m1jax.train.metrics import MetricsLog
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run
from m1jax.train.sft import SFTRecipe, batches

HERE = Path(__file__).parent
PIECES = ('{"name": "look_up", "arguments": {"item": "', '{"name": "calculate", "arguments": {"expression": "', '"}}')
"""of calls, one token each"""
SHARES = (0.6, 0.2)
"""of the demonstrations do it the right way: of the first and of the last, with a straight line between"""
SFT = SFTRecipe(
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=100, final_fraction=0.1),
    steps=800,
    batch=64,
    row_length=96,
    rows=16,
    checkpoint_every=200,
    log_every=25,
)
RL = RLRecipe(
    optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=8, final_fraction=0.1),
    generation=GenerationRecipe(
        prompts=32, samples=8, rounds=2, max_prompt_tokens=8, max_new_tokens=56, max_turns=12, chat=False
    ),
    reward=RewardRecipe(format_reward=0.0),
    update=UpdateRecipe(updates=8, row_length=96, rows=16),
    evaluation=EvaluationRecipe(evaluate_every=4, evaluate_rounds=4),
    iterations=16,
    checkpoint_every=64,
)
RECIPES = {
    "shop": (SFT, RL),
    # Ten sums of three digits in a row, where the shop has one call after another.
    "guess": (dataclasses.replace(SFT, steps=1600), dataclasses.replace(RL, iterations=24)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One seed of one task, or the report of all there are."""

    task: Literal["shop", "guess"] = "shop"
    seed: int = 0
    runs: Path = Path("runs/tool_use")
    """The results go to RUNS/TASK-SEED."""
    report: bool = False


def tokenizer() -> Tokenizer:
    """Bytes, the prompt format's tokens, and the pieces of calls."""
    with tempfile.TemporaryDirectory() as directory:
        Tokenizer.tiny().save(directory)
        backend = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
    backend.add_tokens(list(PIECES))
    return Tokenizer(backend)


Said = list[tuple[str, str]]
"""turns of the model, each with what it is answered"""


def shopping(problem: Problem, use_tools: bool, rng: np.random.Generator) -> tuple[str, Said]:
    """A right solution by tools, or a guess of the price."""
    count, item = problem.prompt[:-1].split("*")
    price = look_up(item)
    if not use_tools:
        return problem.prompt, [(f"<think></think>{int(count) * rng.integers(10, 100)}", "")]
    first, second, end = PIECES
    return problem.prompt, [
        (f"<tool_calls>{first}{item}{end}</tool_calls>", str(price)),
        (f"<tool_calls>{second}{count}*{price}{end}</tool_calls>", problem.answer),
        (f"<think></think>{problem.answer}", ""),
    ]


def guessing(problem: Problem, halve: bool, rng: np.random.Generator) -> tuple[str, Said]:
    """A game won by halving what is left, or guesses out of the air."""
    game, step = GuessingGame(), 2 ** (HIGHEST.bit_length() - 1)
    (opening,) = game.reset(problem, rng)
    said: Said = []
    guess, done = step, False
    while not done:
        answers, done, *_ = game.step(text := f"{guess if halve else rng.integers(HIGHEST + 1):03}")
        said.append((text, answer := "".join(message["content"] for message in answers)))
        step //= 2
        guess += -step if answer == "<" else step
    return opening["content"], said


SOLUTIONS = {"shop": shopping, "guess": guessing}


def demonstration(words: Tokenizer, prompt: str, said: Said) -> Batch:
    """A conversation to learn from; only the model's own turns are trained on."""
    ids = words.encode(prompt)
    written = [False] * len(ids)
    for turn, result in said:
        for tokens, own in (([*words.encode(turn), words.eos_id], True), (words.encode(result), False)):
            ids += tokens
            written += [own] * len(tokens)
    return packing.masked(np.array(ids, np.int32), np.array(written))


def train(config: Config) -> None:
    """SFT, then RL; goes on where it was."""
    seed, words, task = config.seed, tokenizer(), get_task(config.task)
    warm, rl = RECIPES[config.task]
    model_config = dataclasses.replace(ModelConfig.preset("m1-demo"), vocab_size=272)
    run = Run(
        config.runs / f"{config.task}-{seed}",
        {"seed": seed, "model_config": model_config, "sft": warm, "rl": rl, "shares": SHARES},
    )
    model = MiniMaxM1(model_config, rngs=nnx.Rngs(seed))
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    print(f"{config.task}, seed {seed}: {size:,} parameters", flush=True)

    def example(number: int) -> Batch:
        rng = np.random.default_rng([seed, number])
        rightly = rng.random() < np.interp(number, (0, warm.steps * warm.batch), SHARES)
        problem = task.problem("train", seed + 1_000_000, number)
        return demonstration(words, *SOLUTIONS[config.task](problem, bool(rightly), rng))

    begin, processor = time.monotonic(), time.process_time()
    examples = grain.MapDataset.range(ENDLESS).map(lambda number: example(int(number)))
    model = fit(run, model, batches(examples, warm), warm, phase="sft")
    Trainer(run, model, task, words, rl, seed).train()
    spent = {"parameters": size, "wall": time.monotonic() - begin, "processor": time.process_time() - processor}
    (run.directory / "spent.json").write_text(json.dumps(spent))
    run.close()


def report(runs: Path) -> None:
    """result.json and curves.png."""
    import matplotlib.pyplot as plt

    found = {}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for directory in sorted(runs.iterdir()):
        task, _, seed = directory.name.partition("-")
        records = MetricsLog(directory, writes=False).of(PHASE)
        before = MetricsLog(directory, writes=False).of("sft")[-1]["seconds"]
        heldout = [(r["step"], r["heldout_reward"], before + r["seconds"]) for r in records if "heldout_reward" in r]
        spent = directory / "spent.json"
        found[directory.name] = {
            "heldout_reward": [reward for _, reward, _ in heldout],
            "generation_batch": [step for step, _, _ in heldout],
            "seconds": [seconds for _, _, seconds in heldout],
            "length": [(r["step"], r["length"]) for r in records if "length" in r],
            **(json.loads(spent.read_text()) if spent.exists() else {"unfinished": True}),
        }
        axes[list(SOLUTIONS).index(task)].plot(
            [seconds / 60 for _, _, seconds in heldout],
            [reward for _, reward, _ in heldout],
            marker="o",
            label=f"seed {seed}",
        )
    for axis, task in zip(axes, SOLUTIONS):
        axis.set(title=task, xlabel="minutes, SFT among them", ylabel="held-out reward", ylim=(0, 1))
        axis.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
        axis.legend()
    figure.savefig(HERE / "curves.png", dpi=110)
    (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n")


def main(config: Config) -> None:
    """Trains one seed, or reports."""
    report(config.runs) if config.report else train(config)


if __name__ == "__main__":
    main(tyro.cli(Config))
