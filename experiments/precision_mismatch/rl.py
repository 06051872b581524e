"""What head, states and routes do to the RL run of `m1jax demo`; what is done is kept, line by line."""

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import jax
import numpy as np
from flax import nnx

from experiments.precision_mismatch.figure3 import Arm
from experiments.precision_mismatch.lines import Lines, Record
from experiments.precision_mismatch.switches import precision
from m1jax import demo
from m1jax.chat import Tokenizer
from m1jax.config import ModelConfig
from m1jax.model import MiniMaxM1
from m1jax.rl.tasks import get_task
from m1jax.rl.trainer import PHASE, Trainer
from m1jax.train.run import Run

SEEDS = (0, 1, 2)
ARMS = (
    Arm("float32", "float32", False),
    Arm("bfloat16", "float32", False),
    Arm("bfloat16", "bfloat16", False),
    Arm("float32", "float32", True),
    Arm("bfloat16", "bfloat16", True),
)


def fresh(seed: int) -> MiniMaxM1:
    """The demo's model at random; it computes in bfloat16, on a CPU in float32."""
    return MiniMaxM1(ModelConfig.preset(demo.PRESET), rngs=nnx.Rngs(seed))


def start(work: Path, seed: int) -> MiniMaxM1:
    """The demo's model after its demonstrations; from the file where it is there already."""
    file, model = work / f"demo-start-{seed}.npz", fresh(seed)
    graph, params = nnx.split(model)
    leaves, structure = jax.tree.flatten(params)
    if not file.exists():
        with tempfile.TemporaryDirectory() as directory:
            run = Run(directory, {"sft": demo.SFT})
            leaves = jax.tree.leaves(jax.device_get(nnx.state(demo.warm_start(run, model, seed))))
            run.close()
        made = file.with_suffix(".part.npz")
        np.savez(made, *leaves)
        made.replace(file)
    with np.load(file) as arrays:
        leaves = [jax.numpy.asarray(arrays[f"arr_{n}"]) for n in range(structure.num_leaves)]
    return nnx.merge(graph, jax.tree.unflatten(structure, leaves))


def measure(out: Path, work: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Record]:
    """Adds to `rl.jsonl`, a line per generation batch, the runs that are not there to their end; all of it."""
    lines = Lines(out / "rl.jsonl")
    for seed in seeds:
        start(work, seed)
    for arm in arms:
        with precision(arm.head, arm.state):
            for seed in seeds:
                if all(run[0]["seed"] != seed for run in finished(lines.records, arm)):
                    train(start(work, seed), arm, seed, lines)
    return lines.records


def train(model: MiniMaxM1, arm: Arm, seed: int, lines: Lines) -> None:
    """The demo's reinforcement learning of one arm."""
    begun = time.monotonic()
    update = dataclasses.replace(demo.RL.update, replay_routes=arm.replay)
    recipe = dataclasses.replace(demo.RL, update=update)
    with tempfile.TemporaryDirectory() as directory:
        run = Run(directory, {"rl": recipe})
        append = run.log.append

        def noted(phase: str, step: int, values: dict[str, float]) -> None:
            append(phase, step, values)
            if phase == PHASE:
                kept = {name: values[name] for name in KEPT if name in values}
                device = {"device": jax.devices()[0].device_kind, "since": time.monotonic() - begun}
                lines.add(arm._asdict() | {"seed": seed, "step": step} | kept | device)
                print(f"{arm}, seed {seed}: {step}, {kept}", flush=True)

        run.log.append = noted  # pyright: ignore[reportAttributeAccessIssue]
        Trainer(run, model, get_task(demo.TASK), Tokenizer.tiny(), recipe, seed).train()
        run.close()


KEPT = ("accuracy", "heldout_accuracy", "pearson", "sampler_gap", "entropy", "length", "ratio_max", "kl_k3")


def finished(records: Sequence[Record], arm: Arm) -> list[list[Record]]:
    """An arm's runs that came to their last batch, batch by batch."""
    mine = [r for r in records if (r["head"], r["state"], r["replay"]) == arm and r["step"] > 0]
    runs = [[r for r in mine if r["seed"] == seed] for seed in sorted({r["seed"] for r in mine})]
    return [run for run in runs if run[-1]["step"] == demo.RL.iterations]


def table(records: Sequence[Record]) -> str:
    """Markdown: medians over an arm's runs, and ranges."""
    lines = [
        "| head | lightning states | routes | runs | accuracy, first four batches | last four | held out, at the end "
        "| Pearson, median (least) | largest gap, median (most) | entropy at the end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        runs = finished(records, arm)
        if not runs:
            continue
        pearson, gap = ([r[name] for run in runs for r in run if name in r] for name in ("pearson", "sampler_gap"))
        lines.append(
            f"| {arm.head} | {arm.state} | {'replayed' if arm.replay else 'free'} | {len(runs)} "
            f"| {spread(mean(r['accuracy'] for r in run[:4]) for run in runs)} "
            f"| {spread(mean(r['accuracy'] for r in run[-4:]) for run in runs)} "
            f"| {spread(run[-1]['heldout_accuracy'] for run in runs)} "
            f"| {np.median(pearson):.5f} ({min(pearson):.5f}) | {np.median(gap):.2f} ({max(gap):.2f}) "
            f"| {spread([r['entropy'] for r in run if 'entropy' in r][-1] for run in runs)} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: Iterable[float]) -> str:
    there = sorted(values)
    return f"{np.median(there):.3f} ({there[0]:.3f} to {there[-1]:.3f})"


def picture(records: Sequence[Record], file: Path) -> None:
    """Accuracy, correlation and largest gap against batches, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"accuracy": "accuracy", "pearson": "1 - Pearson correlation", "sampler_gap": "largest gap, nats"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for number, arm in enumerate(ARMS):
        for index, run in enumerate(finished(records, arm)):
            for axis, name in zip(axes, shown):
                told = [r.get(name, np.nan) for r in run]  # a batch that taught nothing has no gap
                series = [1 - x for x in told] if name == "pearson" else told
                label = None if index else str(arm)
                axis.plot([r["step"] for r in run], series, f"C{number}", label=label, linewidth=1.0)
    for axis, label in zip(axes, shown.values()):
        axis.set_xlabel("generation batches of 16 updates")
        axis.set_ylabel(label)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
