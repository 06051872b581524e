"""Figure 3 and short RL runs, each under every head, state and router replay; what is done is kept, line by line."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import get_args

import jax
import numpy as np
from flax import nnx

from experiments.precision_mismatch import figure3
from experiments.precision_mismatch.figure3 import ARMS, Arm, Scale, Text
from experiments.precision_mismatch.lines import Lines, Record
from experiments.precision_mismatch.switches import Bits, precision
from m1jax.chat import Tokenizer
from m1jax.rl.recipe import EvaluationRecipe, GenerationRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.tasks import get_task
from m1jax.rl.trainer import PHASE, Trainer
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Run

SEEDS = (0, 1, 2)
SHOWN = 3000
"""pairs of an arm in the scatter"""
RL_SEEDS = (0, 1, 2)
"""of problems and samples; the start is one"""
RL_START_STEPS = 500
RL_ARMS = (
    Arm("float32", "float32", False),
    Arm("bfloat16", "float32", False),
    Arm("bfloat16", "bfloat16", False),
    Arm("float32", "float32", True),
    Arm("bfloat16", "bfloat16", True),
)
RL = RLRecipe(
    optimizer=OptimizerConfig(learning_rate=4e-5, warmup_steps=16),
    generation=GenerationRecipe(prompts=32, samples=8, rounds=1, max_prompt_tokens=14, max_new_tokens=40, chat=False),
    update=UpdateRecipe(updates=16, row_length=512, rows=4),
    evaluation=EvaluationRecipe(evaluate_every=20, evaluate_rounds=1),
    iterations=20,
    checkpoint_every=100_000,
)
SMALL_RL = dataclasses.replace(RL, iterations=2, evaluation=EvaluationRecipe(evaluate_every=2, evaluate_rounds=1))


def parameters(size: Scale, file: Path, seed: int, demonstrations: float) -> tuple[nnx.State, float]:
    """Trained ones, from the file where it is there already."""
    abstract = nnx.state(nnx.eval_shape(lambda: figure3.MiniMaxM1(size.config, rngs=nnx.Rngs(0))))
    structure = jax.tree.structure(abstract)
    if not file.exists():
        begun = time.monotonic()
        params, loss = figure3.trained(size, Text(size, seed, demonstrations), seed)
        leaves = jax.tree.leaves(jax.device_get(params))
        made = file.with_suffix(".part.npz")
        np.savez(made, *leaves, loss=loss)
        made.replace(file)
        count = sum(leaf.size for leaf in leaves)
        print(f"seed {seed}: {count:,} parameters, loss {loss:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    with np.load(file) as arrays:
        leaves = [jax.numpy.asarray(arrays[f"arr_{n}"]) for n in range(structure.num_leaves)]
        return jax.tree.unflatten(structure, leaves), float(arrays["loss"])


def scatter(out: Path, work: Path, seeds: Sequence[int]) -> list[Record]:
    """Figure 3's numbers: `figure3.jsonl`, and pairs of the first seed in `scatter.npz`. Every seed by itself, so that
    whole seeds are there when time runs out."""
    size, lines = figure3.scale(), Lines(out / "figure3.jsonl")
    pairs_file = out / "scatter.npz"
    pairs = dict(np.load(pairs_file)) if pairs_file.exists() else {}
    for seed in seeds:
        params, loss = parameters(size, work / f"trained-{seed}.npz", seed, figure3.DEMONSTRATIONS)
        prompts = Text(size, 500 + seed).code(size.samples, figure3.PROMPT)
        # The head first: it is what the report's claim is about.
        for state, head in itertools.product(get_args(Bits), get_args(Bits)):
            there = [r for r in lines.records if (r["seed"], r["head"], r["state"]) == (seed, head, state)]
            if len(there) == 2:
                continue
            begun = time.monotonic()
            with precision(head, state):
                written = figure3.sample(size, params, prompts, seed)
                for replay in (False, True):
                    arm = Arm(head, state, replay)
                    trainer = figure3.score(size, params, written, replay=replay)
                    gap = figure3.compare(written.logp, trainer)
                    certain = float(np.mean(np.exp(written.logp) > 0.9))
                    said = {"seed": seed, "loss": loss, "device": jax.devices()[0].device_kind, "certain": certain}
                    lines.add(arm._asdict() | gap._asdict() | said)
                    if seed == SEEDS[0]:
                        chosen = np.random.default_rng(0).permutation(trainer.size)[:SHOWN]
                        taken = np.stack([written.logp.ravel()[chosen], trainer.ravel()[chosen]])
                        pairs[str(arm)] = taken.astype(np.float32)
                        np.savez(pairs_file, **pairs)
                    print(f"seed {seed}, {arm}: {gap}, {time.monotonic() - begun:.0f} s", flush=True)
    return lines.records


def rl_runs(out: Path, work: Path, arms: Sequence[Arm]) -> list[Record]:
    """What each arm does to a short RL run with the product's own trainer: `rl.jsonl`, a line per generation batch."""
    size, lines = figure3.scale(), Lines(out / "rl.jsonl")
    start = dataclasses.replace(size, steps=min(size.steps, RL_START_STEPS))
    params, _ = parameters(start, work / "rl-start.npz", 0, 1.0)
    recipe = SMALL_RL if jax.default_backend() == "cpu" else RL
    for arm in arms:
        with precision(arm.head, arm.state):
            for seed in RL_SEEDS:
                there = [r["step"] for r in of_arm(lines.records, arm) if r["seed"] == seed]
                if recipe.iterations not in there:
                    model = nnx.merge(figure3.graph_of(size), jax.tree.map(jax.numpy.copy, params))
                    rl_run(model, recipe, arm, seed, lines)
    return lines.records


def rl_run(model: figure3.MiniMaxM1, recipe: RLRecipe, arm: Arm, seed: int, lines: Lines) -> None:
    begun = time.monotonic()
    update = dataclasses.replace(recipe.update, replay_routes=arm.replay)
    here = dataclasses.replace(recipe, update=update)
    with tempfile.TemporaryDirectory() as directory:
        run = Run(directory, {"recipe": here})
        append = run.log.append

        def noted(phase: str, step: int, values: dict[str, float]) -> None:
            append(phase, step, values)
            if phase == PHASE:
                kept = {name: float(x) for name, x in values.items() if isinstance(x, int | float | np.number)}
                said = {"seed": seed, "step": step} | kept | {"since": time.monotonic() - begun}
                lines.add(arm._asdict() | said)
                print(f"{arm}, seed {seed}: {step}, accuracy {kept.get('accuracy')}", flush=True)

        run.log.append = noted  # pyright: ignore[reportAttributeAccessIssue]
        Trainer(run, model, get_task(figure3.TASK), Tokenizer.tiny(), here, seed).train()
        run.close()


def of_arm(records: Sequence[Record], arm: Arm) -> list[Record]:
    return [r for r in records if (r["head"], r["state"], r["replay"]) == arm]


def sentence(records: Sequence[Record]) -> str:
    """The verdict, as the README laid down."""
    means = {(r["head"], r["state"], r["seed"]): r["mean"] for r in records if not r["replay"]}
    left = [
        mean / means["bfloat16", state, seed]
        for (head, state, seed), mean in means.items()
        if head == "float32" and ("bfloat16", state, seed) in means
    ]
    cause = all(share <= 0.5 for share in left)
    said = "The head is the cause" if cause else "The head is not the cause here"
    return f"{said}: in float32 it leaves {min(left):.0%} to {max(left):.0%} of the mean gap."


def table(records: Sequence[Record]) -> str:
    """Markdown: the verdict and the arms."""
    lines = [
        f"**{sentence(records)}** ({records[0]['device']})",
        "",
        "| head | lightning states | routes | correlation | mean gap | largest gap |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        found = of_arm(records, arm)
        if not found:
            continue
        shown = {name: [r[name] for r in found] for name in figure3.Gap._fields}
        least = min(shown["correlation"])
        lines.append(
            f"| {arm.head} | {arm.state} | {'replayed' if arm.replay else 'free'} "
            f"| {np.median(shown['correlation']):.6f} ({least:.6f} at worst) "
            f"| {spread(shown['mean'])} | {spread(shown['largest'])} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.1e} ({min(values):.1e} to {max(values):.1e})"


def picture(pairs: dict[str, np.ndarray], file: Path) -> None:
    """Probabilities in trainer against sampler, as the report draws them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 6.6), sharex=True, sharey=True)
    for axis, arm in zip(axes.flat, ARMS):
        if str(arm) in pairs:
            sampler, trainer = np.exp(pairs[str(arm)])
            axis.plot(sampler, trainer, ".", markersize=2, alpha=0.4)
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.6)
        routes = "replayed" if arm.replay else "free"
        axis.set_title(f"head {arm.head}, states {arm.state},\nroutes {routes}", fontsize=8)
    figure.supxlabel("probability in the sampler")
    figure.supylabel("probability in the trainer")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def rl_table(records: Sequence[Record]) -> str:
    """Markdown: what became of each arm's runs, those that came to their last batch: medians over seeds, and ranges."""
    lines = [
        "| head | lightning states | routes | runs | accuracy, first five batches | last five | held out, at the end "
        "| Pearson, median (least) | largest gap, median (most) | entropy at the end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in RL_ARMS:
        runs = finished(records, arm)
        if not runs:
            continue
        pearson, gap = ([r[name] for run in runs for r in run] for name in ("pearson", "sampler_gap"))
        lines.append(
            f"| {arm.head} | {arm.state} | {'replayed' if arm.replay else 'free'} | {len(runs)} "
            f"| {range_of(mean(r['accuracy'] for r in run[:5]) for run in runs)} "
            f"| {range_of(mean(r['accuracy'] for r in run[-5:]) for run in runs)} "
            f"| {range_of(run[-1]['heldout_accuracy'] for run in runs)} "
            f"| {np.median(pearson):.5f} ({min(pearson):.5f}) | {np.median(gap):.2f} ({max(gap):.2f}) "
            f"| {range_of(run[-1]['entropy'] for run in runs)} |"
        )
    return "\n".join(lines) + "\n"


def finished(records: Sequence[Record], arm: Arm) -> list[list[Record]]:
    """An arm's runs that came to their last batch, batch by batch."""
    runs = [[r for r in of_arm(records, arm) if r["seed"] == seed and r["step"] > 0] for seed in RL_SEEDS]
    return [run for run in runs if run and "heldout_accuracy" in run[-1]]


def range_of(values: Iterable[float]) -> str:
    there = sorted(values)
    return f"{np.median(there):.3f} ({there[0]:.3f} to {there[-1]:.3f})"


def rl_picture(records: Sequence[Record], file: Path) -> None:
    """Accuracy, correlation and largest gap against batches, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"accuracy": "accuracy", "pearson": "Pearson correlation", "sampler_gap": "largest gap, nats"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for number, arm in enumerate(RL_ARMS):
        for run in finished(records, arm):
            label = str(arm) if run[0]["seed"] == RL_SEEDS[0] else None
            for axis, name in zip(axes, shown):
                axis.plot([r["step"] for r in run], [r[name] for r in run], f"C{number}", label=label, linewidth=1.0)
    for axis, label in zip(axes, shown.values()):
        axis.set_xlabel("generation batches of 16 updates")
        axis.set_ylabel(label)
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
