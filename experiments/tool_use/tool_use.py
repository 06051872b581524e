"""A small model learns to call a calculator and a look-up: SFT that mostly guesses, then CISPO (see README.md)."""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

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
RUNS = Path("runs/tool_use")
PIECES = ('{"name": "look_up", "arguments": {"item": "', '{"name": "calculate", "arguments": {"expression": "', '"}}')
"""of calls, one token each"""
SHARES = (0.6, 0.2)
"""of the demonstrations use the tools: of the first and of the last, with a straight line between"""
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
        prompts=32, samples=8, rounds=2, max_prompt_tokens=8, max_new_tokens=48, max_turns=4, chat=False
    ),
    reward=RewardRecipe(format_reward=0.0),
    update=UpdateRecipe(updates=8, row_length=96, rows=16),
    evaluation=EvaluationRecipe(evaluate_every=4, evaluate_rounds=4),
    iterations=16,
    checkpoint_every=64,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One seed, or the report of all."""

    seed: int = 0
    report: bool = False


def tokenizer() -> Tokenizer:
    """Bytes, the prompt format's tokens, and the pieces of calls."""
    with tempfile.TemporaryDirectory() as directory:
        Tokenizer.tiny().save(directory)
        backend = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
    backend.add_tokens(list(PIECES))
    return Tokenizer(backend)


def demonstration(words: Tokenizer, problem: Problem, use_tools: bool, rng: np.random.Generator) -> Batch:
    """A right solution by tools, or a guess of the price."""
    count, item = problem.prompt[:-1].split("*")
    price = look_up(item)
    if use_tools:
        first, second, end = PIECES
        said = [
            (f"<tool_calls>{first}{item}{end}</tool_calls>", str(price)),
            (f"<tool_calls>{second}{count}*{price}{end}</tool_calls>", problem.answer),
            (f"<think></think>{problem.answer}", ""),
        ]
    else:
        said = [(f"<think></think>{int(count) * rng.integers(10, 100)}", "")]
    ids = words.encode(problem.prompt)
    written = [False] * len(ids)
    for turn, result in said:
        for tokens, own in (([*words.encode(turn), words.eos_id], True), (words.encode(result), False)):
            ids += tokens
            written += [own] * len(tokens)
    return packing.masked(np.array(ids, np.int32), np.array(written))


def train(seed: int) -> None:
    """SFT, then RL; goes on where it was."""
    words, task = tokenizer(), get_task("shop")
    config = dataclasses.replace(ModelConfig.preset("m1-demo"), vocab_size=272)
    run = Run(RUNS / str(seed), {"seed": seed, "model_config": config, "sft": SFT, "rl": RL, "shares": SHARES})
    model = MiniMaxM1(config, rngs=nnx.Rngs(seed))
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    print(f"{size:,} parameters")

    def example(number: int) -> Batch:
        rng = np.random.default_rng([seed, number])
        use_tools = rng.random() < np.interp(number, (0, SFT.steps * SFT.batch), SHARES)
        return demonstration(words, task.problem("train", seed + 1_000_000, number), bool(use_tools), rng)

    begin, processor = time.monotonic(), time.process_time()
    examples = grain.MapDataset.range(ENDLESS).map(lambda number: example(int(number)))
    model = fit(run, model, batches(examples, SFT), SFT, phase="sft")
    Trainer(run, model, task, words, RL, seed).train()
    spent = {"parameters": size, "wall": time.monotonic() - begin, "processor": time.process_time() - processor}
    (run.directory / "spent.json").write_text(json.dumps(spent))
    run.close()


def report() -> None:
    """result.json and curves.png."""
    import matplotlib.pyplot as plt

    found = {}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for directory in sorted(RUNS.iterdir()):
        records = MetricsLog(directory, writes=False).of(PHASE)
        heldout = [(r["step"], r["heldout_reward"]) for r in records if "heldout_reward" in r]
        lengths = [(r["step"], r["length"]) for r in records if "length" in r]
        spent = directory / "spent.json"
        found[directory.name] = {
            "heldout_reward": heldout,
            "length": lengths,
            "rl_steps": records[-1]["step"],
            **(json.loads(spent.read_text()) if spent.exists() else {"unfinished": True}),
        }
        axes[0].plot(*zip(*heldout), marker="o", label=f"seed {directory.name}")
        if lengths:
            axes[1].plot(*zip(*lengths))
    axes[0].set(xlabel="generation batch", ylabel="held-out reward", ylim=(0, 1))
    axes[1].set(xlabel="generation batch", ylabel="tokens written")
    axes[0].legend()
    figure.savefig(HERE / "curves.png", dpi=110)
    (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n")


def main(config: Config) -> None:
    """Trains one seed, or reports."""
    report() if config.report else train(config.seed)


if __name__ == "__main__":
    main(tyro.cli(Config))
