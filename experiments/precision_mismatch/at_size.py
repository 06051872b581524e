"""Figure 3 and short RL runs, each under every head, state and router replay; what is done is kept, line by line."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
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
RL_SEED, RL_START_STEPS = 0, 500
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
    recipe = SMALL_RL if jax.default_backend() == "cpu" else RL
    start = dataclasses.replace(size, steps=min(size.steps, RL_START_STEPS))
    params, _ = parameters(start, work / "rl-start.npz", RL_SEED, 1.0)
    task, words = get_task(figure3.TASK), Tokenizer.tiny()
    for arm in arms:
        there = [r for r in lines.records if Arm(r["head"], r["state"], r["replay"]) == arm]
        if any(r["step"] == recipe.iterations for r in there):
            continue
        begun = time.monotonic()
        update = dataclasses.replace(recipe.update, replay_routes=arm.replay)
        here = dataclasses.replace(recipe, update=update)
        with tempfile.TemporaryDirectory() as directory, precision(arm.head, arm.state):
            run = Run(directory, {"recipe": here})
            append = run.log.append

            def noted(phase: str, step: int, values: dict[str, float], arm=arm, append=append, begun=begun) -> None:
                append(phase, step, values)
                if phase == PHASE:
                    kept = {name: float(x) for name, x in values.items() if isinstance(x, int | float | np.number)}
                    lines.add(arm._asdict() | {"step": step} | kept | {"since": time.monotonic() - begun})
                    print(f"{arm}: {step}, accuracy {kept.get('accuracy')}", flush=True)

            run.log.append = noted  # pyright: ignore[reportAttributeAccessIssue]
            model = nnx.merge(figure3.graph_of(size), jax.tree.map(jax.numpy.copy, params))
            Trainer(run, model, task, words, here, RL_SEED).train()
            run.close()
    return lines.records


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
    """Markdown: what became of each run."""
    lines = [
        "| head | lightning states | routes | batches | accuracy, first five | last five | held out, at the end "
        "| Pearson, median (least) | largest gap, median (most) | entropy at the end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in RL_ARMS:
        found = [r for r in of_arm(records, arm) if r["step"] > 0]
        if not found:
            continue
        series = {name: [r[name] for r in found] for name in ("accuracy", "pearson", "sampler_gap", "entropy")}
        heldout = [r["heldout_accuracy"] for r in found if "heldout_accuracy" in r]
        lines.append(
            f"| {arm.head} | {arm.state} | {'replayed' if arm.replay else 'free'} | {len(found)} "
            f"| {np.mean(series['accuracy'][:5]):.3f} | {np.mean(series['accuracy'][-5:]):.3f} "
            f"| {heldout[-1] if heldout else float('nan'):.3f} "
            f"| {np.median(series['pearson']):.5f} ({min(series['pearson']):.5f}) "
            f"| {np.median(series['sampler_gap']):.2f} ({max(series['sampler_gap']):.2f}) "
            f"| {series['entropy'][-1]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def rl_picture(records: Sequence[Record], file: Path) -> None:
    """Accuracy, correlation and largest gap against batches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"accuracy": "accuracy", "pearson": "Pearson correlation", "sampler_gap": "largest gap, nats"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for arm in RL_ARMS:
        found = [r for r in of_arm(records, arm) if r["step"] > 0]
        for axis, name in zip(axes, shown):
            axis.plot([r["step"] for r in found], [r[name] for r in found], label=str(arm), linewidth=1.2)
    for axis, label in zip(axes, shown.values()):
        axis.set_xlabel("generation batches of 16 updates")
        axis.set_ylabel(label)
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
