"""Why did M1's sampler and trainer disagree, and what halves it? See README.md beside this file.

python -m experiments.precision_mismatch.run [--part figure3 | rl | amplification | trained | demo ...] [--out FOLDER]
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tyro

from experiments.cispo_vs_rivals.policy import portable
from experiments.precision_mismatch import amplification, at_size, rl, trained
from m1jax.disk import write_atomically

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
DEPTHS = (2, 4, 8, 16, 32)
Part = Literal["figure3", "rl", "amplification", "trained", "demo"]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    part: tuple[Part, ...] = ("figure3", "rl", "amplification", "trained")
    seeds: tuple[int, ...] = at_size.SEEDS
    """of figure 3"""
    rl_arms: tuple[int, ...] = tuple(range(len(rl.ARMS)))
    """numbers in `rl.ARMS`"""
    rl_seeds: tuple[int, ...] = rl.SEEDS
    trained: tuple[str, ...] = tuple(trained.settings())
    """settings of the amplification with trained weights"""
    demo: Path = Path("runs/demo/export")
    """a model that `m1jax demo` has trained"""
    out: Path = HERE
    work: Path = HERE / "work"
    """of trained models, 0.7 GB each on a GPU"""


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    config.work.mkdir(parents=True, exist_ok=True)
    texts = []
    if "figure3" in config.part:
        texts.append(of_figure3(config.out, config.work, config.seeds))
    if "rl" in config.part:
        records = rl.measure(config.out, config.work, [rl.ARMS[n] for n in config.rl_arms], config.rl_seeds)
        rl.picture(records, config.out / "rl.png")
        texts.append(rl.table(records))
    if "amplification" in config.part:
        texts.append(of_amplification(config.out))
    if "trained" in config.part:
        with portable():
            texts.append(trained.table(trained.measure(config.out, config.trained)))
    if "demo" in config.part:
        texts.append(trained.of_demo(config.demo))
    text = "\n".join(texts)
    print(text)


def of_figure3(out: Path, work: Path, seeds: Sequence[int]) -> str:
    """Trains, samples, scores; returns the table."""
    records = at_size.scatter(out, work, seeds)
    if (pairs := out / "scatter.npz").exists():  # of the first seed
        at_size.picture(dict(np.load(pairs)), out / "figure3.png")
    return at_size.table(records)


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


if __name__ == "__main__":
    main(tyro.cli(Config))
