"""Figure 3 under every head, state and router replay; what is done is kept, line by line."""

import itertools
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

SEEDS = (0, 1, 2)
SHOWN = 3000
"""pairs of an arm in the scatter"""


def parameters(size: Scale, file: Path, seed: int) -> tuple[nnx.State, float]:
    """Trained ones, from the file where it is there already."""
    abstract = nnx.state(nnx.eval_shape(lambda: figure3.MiniMaxM1(size.config, rngs=nnx.Rngs(0))))
    structure = jax.tree.structure(abstract)
    if not file.exists():
        begun = time.monotonic()
        params, loss = figure3.trained(size, Text(size, seed), seed)
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
        params, loss = parameters(size, work / f"trained-{seed}.npz", seed)
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
