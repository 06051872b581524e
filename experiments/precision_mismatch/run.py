"""Why did M1's sampler and trainer disagree, and what halves it? See README.md beside this file.

python -m experiments.precision_mismatch.run [--part figure3 | amplification] [--out FOLDER]
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import tyro

from experiments.cispo_vs_rivals.policy import portable
from experiments.precision_mismatch import amplification, figure3
from m1jax.disk import write_atomically

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
DEPTHS = (2, 4, 8, 16, 32)
Part = Literal["figure3", "amplification"]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    part: tuple[Part, ...] = get_args(Part)
    out: Path = HERE


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    texts = []
    if "figure3" in config.part:
        # XLA:CPU takes minutes to compile the gradient of experts sorted by token, at a size where it saves nothing.
        with portable() if jax.default_backend() == "cpu" else contextlib.nullcontext():
            texts.append(of_figure3(config.out))
    if "amplification" in config.part:
        texts.append(of_amplification(config.out))
    text = "\n".join(texts)
    print(text)


def of_figure3(out: Path) -> str:
    """Trains, samples, scores; writes `figure3-PLATFORM.json` and its picture; returns the table."""
    size, text = figure3.scale(), figure3.corpus(HERE.parents[1])
    device = jax.devices()[0].device_kind
    records: list[Record] = []
    for seed in SEEDS:
        params, loss = figure3.trained(size, text, seed)
        pairs = figure3.measure(size, params, text, seed)
        for arm, pair in pairs.items():
            gap = figure3.compare(*pair)
            records.append(arm._asdict() | gap._asdict() | {"seed": seed, "loss": loss, "device": device})
        print(f"seed {seed}: loss {loss:.3f} nats a byte", flush=True)
        if seed == SEEDS[0]:
            scatter(pairs, out / f"figure3-{jax.default_backend()}.png")
        write_atomically(out / f"figure3-{jax.default_backend()}.json", json.dumps(records, indent=1) + "\n")
    return figure3_table(records)


def figure3_table(records: Sequence[Record]) -> str:
    """Markdown: the verdict and the arms."""
    lines = [
        f"**{figure3_sentence(records)}** ({records[0]['device']})",
        "",
        "| head | lightning states | routes | correlation | mean gap | largest gap |",
        "|---|---|---|---|---|---|",
    ]
    for arm in figure3.ARMS:
        found = of_arm(records, arm)
        shown = {name: [r[name] for r in found] for name in figure3.Gap._fields}
        least = min(shown["correlation"])
        lines.append(
            f"| {arm.head} | {arm.state} | {'replayed' if arm.replay else 'free'} "
            f"| {np.median(shown['correlation']):.6f} ({least:.6f} at worst) "
            f"| {spread(shown['mean'])} | {spread(shown['largest'])} |"
        )
    return "\n".join(lines) + "\n"


def figure3_sentence(records: Sequence[Record]) -> str:
    """The verdict, as the README laid down."""
    before = of_arm(records, figure3.Arm("bfloat16", "bfloat16", False))
    after = of_arm(records, figure3.Arm("float32", "bfloat16", False))
    left = [b["mean"] / a["mean"] for a, b in zip(before, after)]
    cause = all(share <= 0.5 for share in left)
    said = "The head is the cause" if cause else "The head is not the cause here"
    return f"{said}: in float32 it leaves {min(left):.0%} to {max(left):.0%} of the mean gap."


def of_arm(records: Sequence[Record], arm: figure3.Arm) -> list[Record]:
    return [r for r in records if (r["head"], r["state"], r["replay"]) == arm]


def scatter(pairs: dict[figure3.Arm, tuple[np.ndarray, np.ndarray]], file: Path) -> None:
    """Probabilities in trainer against sampler, as the report draws them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 6.6), sharex=True, sharey=True)
    for axis, (arm, (sampler, trainer)) in zip(axes.flat, pairs.items()):
        axis.plot(np.exp(sampler).ravel(), np.exp(trainer).ravel(), ".", markersize=2, alpha=0.4)
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.6)
        axis.set_title(
            f"head {arm.head}, states {arm.state},\nroutes {'replayed' if arm.replay else 'free'}", fontsize=8
        )
    figure.supxlabel("probability in the sampler")
    figure.supylabel("probability in the trainer")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def of_amplification(out: Path) -> str:
    """Writes `amplification.json` and its picture; returns the table."""
    file = out / "amplification.json"
    records: list[Record] = json.loads(file.read_text()) if file.exists() else []
    there = {(r["name"], r["unit"], r["seed"]) for r in records}
    with portable():
        for name, setting in amplification.settings().items():
            for unit in get_args(amplification.Unit):
                for seed in SEEDS:
                    if (name, unit, seed) not in there:
                        found = amplification.measure(setting, seed, unit)
                        records.append({"name": name, "unit": unit, "seed": seed} | found._asdict())
            write_atomically(file, json.dumps(records) + "\n")
            print(name, flush=True)
    profile(records, out / "amplification.png")
    return amplification_table(records)


def amplification_table(records: Sequence[Record]) -> str:
    """Markdown: relative change of the logits, median over seeds, and over that of M1's own setting."""
    lines = [
        "| setting | float32's unit | over M1's | bfloat16's unit | over M1's | flipped routes |",
        "|---|---|---|---|---|---|",
    ]
    base = {unit: logits(records, "depth 16", unit) for unit in get_args(amplification.Unit)}
    for name in amplification.settings():
        fine, coarse = (logits(records, name, unit) for unit in get_args(amplification.Unit))
        flipped = np.median([r["flipped"] for r in records if (r["name"], r["unit"]) == (name, "bfloat16")])
        lines.append(
            f"| {name} | {fine:.1e} | {fine / base['float32']:.2f} | {coarse:.1e} | {coarse / base['bfloat16']:.2f} "
            f"| {flipped:.2%} |"
        )
    for unit in get_args(amplification.Unit):
        free = amplification.slope({n: logits(records, f"depth {n}", unit) for n in DEPTHS})
        held = amplification.slope({n: logits(records, f"depth {n}, routes replayed", unit) for n in DEPTHS})
        lines += ["", f"Growth with depth, {unit}'s unit: depth^{free:.2f}, with routes replayed depth^{held:.2f}."]
    return "\n".join(lines) + "\n"


def logits(records: Sequence[Record], name: str, unit: str) -> float:
    return float(np.median([r["logits"] for r in records if (r["name"], r["unit"]) == (name, unit)]))


def profile(records: Sequence[Record], file: Path) -> None:
    """Relative change of the residual stream after every layer, median over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ("depth 16", "depth 16, routes replayed", "all lightning", "all softmax", "32 experts",
             "32 experts, routes replayed", "alpha 1, beta 1", "alpha 7.1, beta 1", "pre-norm")  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, unit in zip(axes, get_args(amplification.Unit)):
        for name in shown:
            streams = [r["residual"] for r in records if (r["name"], r["unit"]) == (name, unit)]
            axis.semilogy(range(1, 17), np.median(np.array(streams), axis=0), label=name, linewidth=1.2)
        axis.set_title(f"half a unit of {unit} in every weight", fontsize=9)
        axis.set_xlabel("layer")
    axes[0].set_ylabel("relative change of the residual stream")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.1e} ({min(values):.1e} to {max(values):.1e})"


if __name__ == "__main__":
    main(tyro.cli(Config))
