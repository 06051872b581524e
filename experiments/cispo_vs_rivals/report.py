"""The table and the pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.cispo_vs_rivals import tasks, verdict
from experiments.cispo_vs_rivals.arms import NAMES
from experiments.cispo_vs_rivals.results import Results

UPDATES = (16, 4, 1)


def table(runs: Results, tuning: Results, rates: Sequence[float]) -> str:
    """Markdown: the verdict, then a table per task and number of updates."""
    lines = [f"**{verdict.sentence(verdict.of_cell(runs, 'recheck', 'cispo', 16))}**", ""]
    for task, updates in cells(runs):
        lines += [
            f"`{task}`, {updates} update{'s' * (updates > 1)} per batch",
            "",
            "| arm | learning rate | DAPO's batches over its own | final accuracy | area | final entropy |"
            " tokens cut | recheck tokens cut | responses that recheck, at the end | largest gap |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in NAMES:
            found = list(runs.of(task, arm, updates).values())
            if not found:
                continue
            rate = found[0]["learning_rate"]
            edge = " (end of the grid)" if rate in (min(rates), max(rates)) and len(rates) > 1 else ""
            end = slice(-verdict.LAST, None)
            lines.append(
                f"| {arm} | {rate:g}{edge} | {verdict.of_cell(runs, task, arm, updates) or '-'} "
                f"| {_spread(_mean(r['accuracy'][end]) for r in found)} | {_spread(r['area'] for r in found)} "
                f"| {_spread(_mean(r['entropy'][end]) for r in found)} | {_spread(_mean(r['clipped']) for r in found)} "
                f"| {_spread(_mean(r['clipped_rare']) for r in found)} "
                f"| {_spread(_mean(r['rechecked'][end]) for r in found)} "
                f"| {max(max(r['gap_max']) for r in found):.1e} |"
            )
        lines.append("")
    lines.append(f"Means over seeds ± standard error. {len(runs.records)} runs, and {len(tuning.records)} for tuning.")
    return "\n".join(lines) + "\n"


def cells(runs: Results) -> list[tuple[str, int]]:
    there = {(job.task, job.updates) for job in runs.records}
    return [(task, updates) for task in tasks.TASKS for updates in UPDATES if (task, updates) in there]


def picture(runs: Results, out: Path) -> None:
    """`curves.png`: accuracy against batches, median and quartiles over seeds, 16 updates; and `ratios.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [task for task, updates in cells(runs) if updates == max(UPDATES)]
    if not shown:
        return
    colours = dict(zip(NAMES, plt.get_cmap("tab10").colors))  # pyright: ignore[reportAttributeAccessIssue]
    figure, axes = plt.subplots(2, len(shown), figsize=(4.2 * len(shown), 6.4), squeeze=False, sharex=True)
    for column, task in enumerate(shown):
        for row, what in enumerate(("accuracy", "rechecked")):
            for arm in NAMES:
                curves = [record[what] for record in runs.of(task, arm, max(UPDATES)).values()]
                if curves:
                    low, middle, high = np.quantile(np.array(curves), [0.25, 0.5, 0.75], axis=0)
                    batches = np.arange(1, len(middle) + 1)
                    axes[row][column].plot(batches, middle, label=arm, color=colours[arm], linewidth=1.4)
                    axes[row][column].fill_between(batches, low, high, color=colours[arm], alpha=0.12, linewidth=0)
            axes[row][column].set_ylim(0, 1.02)
        axes[0][column].set_title(task)
        axes[1][column].set_xlabel("generation batches of 16 updates")
    axes[0][0].set_ylabel("accuracy")
    axes[1][0].set_ylabel("responses that recheck")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)

    rows = [(f"{arm}, {task}, {updates}", verdict.of_cell(runs, task, arm, updates))
            for task, updates in cells(runs) if updates > 1 for arm in NAMES if arm != "dapo"]  # fmt: skip
    found = [(name, r) for name, r in rows if r is not None]
    if not found:
        return
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.2 * len(found)))
    for place, (_, r) in enumerate(reversed(found)):
        axis.plot([r.low, r.high], [place, place], color="tab:blue")
        axis.plot([r.mean], [place], "o", color="tab:blue", markersize=4)
    axis.set_yticks(range(len(found)), [name for name, _ in reversed(found)], fontsize=7)
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.axvline(2, color="tab:red", linewidth=0.8, linestyle="--")
    axis.set_xscale("log")
    axis.set_xlabel("batches that DAPO needs over the arm's (red: the report's claim for CISPO)")
    figure.tight_layout()
    figure.savefig(out / "ratios.png", dpi=110)
    plt.close(figure)


def _mean(values: Iterable[float | None]) -> float:
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else float("nan")


def _spread(values: Iterable[float]) -> str:
    there = [v for v in values if np.isfinite(v)]
    if not there:
        return "-"
    error = np.std(there, ddof=1) / np.sqrt(len(there)) if len(there) > 1 else float("nan")
    return f"{np.mean(there):.3f} ± {error:.3f}"
