"""What does M1's RL run cost, and what is half of the steps worth? See README.md beside this file.

python -m experiments.rl_cost.run
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from experiments.cispo_vs_rivals import verdict
from experiments.cispo_vs_rivals.results import Results
from m1jax.config import ModelConfig
from m1jax.plan.hardware import CHIPS, Chip
from m1jax.plan.memory import memory
from m1jax.plan.search import best, spell
from m1jax.plan.setup import Setup
from m1jax.plan.speed import speed

HERE = Path(__file__).parent
DEVICES, HOURS = 512, 21 * 24
MODEL = ModelConfig.preset("m1-456b")
# Measured on one H100 with m1-2b (docs/gpu.md): MFU of an update without recomputed products, and the share that
# decoding 256 sequences reaches of the bound that its traffic sets.
UPDATE_REACHED, DECODING_REACHED = 0.379, 0.67
# Neither is published. The mean response is taken to be half of the window.
RESPONSES_PER_BATCH, UPDATES_PER_BATCH = 8192, 16


class Phase(NamedTuple):
    """What a device spends on a million response tokens of the whole machine."""

    seconds: float
    """of all devices, at the bound"""
    how: str


def generation(chip: Chip, window: int) -> Phase:
    """Decoding by the group of devices and number of rows that the bound likes best; memory for whole windows, time
    for the mean length."""
    found: list[tuple[float, str]] = []
    for devices in (16, 32, 64, 128, 256, 512):
        for rows in (64, 256, 1024, 4096):
            setup = Setup(model=MODEL, task="generate", mesh=ONE, context=window, rows=rows)
            placed = best(setup, chip, devices)
            if placed is not None:
                mean = dataclasses.replace(placed, context=window // 2)
                per_million = speed(mean, chip, 0).million_tokens_seconds * devices / DEVICES
                found.append(
                    (per_million, f"{DEVICES // devices} groups of {devices}, {rows} rows, {spell(placed.mesh)}")
                )
    return Phase(*min(found))


def update(chip: Chip, window: int) -> Phase:
    """An update of rows of the window."""
    placed = best(Setup(model=MODEL, task="rl", mesh=ONE, context=window, rows=1), chip, DEVICES)
    assert placed is not None
    assert sum(memory(placed, chip.platform).values()) <= chip.memory
    found = speed(placed, chip, 0)
    return Phase(found.million_tokens_seconds, f"{spell(placed.mesh)}, bound by {found.bound_by}")


ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "sequence": 1}


def row(name: str, window: int) -> dict[str, object]:
    """What three weeks of 512 H800 buy, done on another chip: price, and how much of it is generation."""
    chip = CHIPS[name]
    generate, train = generation(chip, window), update(chip, window)
    bound = generate.seconds + train.seconds
    measured = generate.seconds / DECODING_REACHED + train.seconds / UPDATE_REACHED
    return {
        "chip": name,
        "window": window,
        "price": chip.price,
        "seconds_per_million_tokens": {"bound": bound, "measured": measured},
        "generation_share": {
            "bound": generate.seconds / bound,
            "measured": generate.seconds / DECODING_REACHED / measured,
        },
        "generation": generate.how,
        "update": train.how,
    }


def bought(h800: dict, kind: str) -> float:
    """Millions of tokens in three weeks of 512 H800."""
    return HOURS * 3600 / h800["seconds_per_million_tokens"][kind]


def table(rows: list[dict], measured: dict[str, Results]) -> str:
    """Markdown. `measured`: runs of cispo_vs_rivals by size of the model."""
    lines = ["| window | | tokens | samples | batches | updates |", "|---|---|---|---|---|---|"]
    h800 = {r["window"]: r for r in rows if r["chip"] == "h800"}
    for window, r in h800.items():
        for kind in ("bound", "measured"):
            tokens = bought(r, kind) * 1e6
            samples = tokens / (window / 2)
            batches = samples / RESPONSES_PER_BATCH
            lines.append(
                f"| {window // 1024}K | {LABEL[kind]} | {tokens / 1e9:.1f} G | {samples / 1e6:.2f} M | {batches:,.0f} "
                f"| {batches * UPDATES_PER_BATCH:,.0f} |"
            )
    lines += [
        "",
        "| chip | window | the same tokens, measured rates | at the bounds | generation's share, measured / bound "
        "| generation | update |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        # The H800's own run is three weeks by definition; the same tokens elsewhere take longer or shorter.
        weeks = {k: bought(h800[r["window"]], k) * r["seconds_per_million_tokens"][k] / 604_800 for k in LABEL}
        dollars = {k: w * 168 * DEVICES * r["price"] for k, w in weeks.items()}
        lines.append(
            f"| {r['chip']} | {r['window'] // 1024}K | ${dollars['measured']:,.0f}, {weeks['measured']:.1f} weeks "
            f"| ${dollars['bound']:,.0f}, {weeks['bound']:.1f} weeks "
            f"| {r['generation_share']['measured']:.0%} / {r['generation_share']['bound']:.0%} "
            f"| {r['generation']} | {r['update']} |"
        )
    price = DEVICES * HOURS * CHIPS["h800"].price
    for size, runs in measured.items():
        found = verdict.of_cell(runs, "recheck", "cispo", 16)
        if found is None:
            lines += ["", f"What CISPO's steps are worth with {size}: cispo_vs_rivals has no results yet."]
            continue
        saved = [price * (r - 1) for r in (found.mean, found.low, found.high)]
        lines += [
            "",
            f"With the ratio of cispo_vs_rivals with {size}, {found}, a DAPO run as good would have cost "
            f"${saved[0]:,.0f} more [{saved[1]:,.0f}, {saved[2]:,.0f}]; with the report's ratio of 2, ${price:,.0f}.",
        ]
    return "\n".join(lines) + "\n"


LABEL = {"bound": "at the planner's bounds", "measured": "at the shares measured on one H100"}


def picture(rows: list[dict], file: Path) -> None:
    """Dollars per million tokens, generation and update, at measured shares."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3))
    names = [f"{r['chip']}\n{r['window'] // 1024}K" for r in rows]
    dollars = [r["seconds_per_million_tokens"]["measured"] / 3600 * DEVICES * r["price"] for r in rows]
    share = [r["generation_share"]["measured"] for r in rows]
    generate = [d * s for d, s in zip(dollars, share)]
    axis.bar(names, generate, label="generation")
    axis.bar(names, [d - g for d, g in zip(dollars, generate)], bottom=generate, label="update")
    axis.set_ylabel("$ per million response tokens")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    rows = [row(name, window * 1024) for window in (40, 80) for name in ("h800", "h100", "h200", "v5p")]
    (HERE / "result.json").write_text(json.dumps(rows, indent=1) + "\n")
    rivals = HERE.parent / "cispo_vs_rivals"
    folders = {"0.1 M parameters": "results", "36 M parameters": "results-large"}
    text = table(rows, {size: Results(rivals / folder, "runs") for size, folder in folders.items()})
    (HERE / "table.md").write_text(text)
    picture(rows, HERE / "cost.png")
    print(text)


if __name__ == "__main__":
    main()
