"""The verdict, the table and the survival curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cispo_collapse.survival import DIAGNOSTICS, wilson

Record = dict[str, Any]


def of(records: Sequence[Record], **wanted: object) -> list[Record]:
    return [r for r in records if all(r[name] == value for name, value in wanted.items())]


def watched(records: Sequence[Record]) -> list[Record]:
    """Those that were watched to the end."""
    longest = max(r["batches"] for r in records)
    return of(records, batches=longest)


def surviving(records: Sequence[Record]) -> tuple[float, float, float]:
    """Share of runs that did not collapse, and its interval."""
    alive = sum(r["collapsed"] is None for r in records)
    return alive / len(records), *wilson(alive, len(records))


def sentence(records: Sequence[Record]) -> str:
    """The verdict, as the README laid down."""
    where = []
    for mismatch in sorted({r["mismatch"] for r in records}):
        plain = dict(mismatch=mismatch, truncated=False, replay=False)
        share, _, high = surviving(of(records, arm="cispo", **plain))
        _, low, _ = surviving(of(records, arm="dapo", **plain))
        if share <= 0.5 and high < low:
            where.append(mismatch)
    if 0.0 in where:
        return "CISPO collapses, without any mismatch, where DAPO does not."
    if where:
        return f"CISPO collapses only under mismatch (x {where[0]:g}), where DAPO does not."
    return "Not here: CISPO does not collapse where DAPO survives."


def table(records: Sequence[Record]) -> str:
    """Markdown."""
    lines = [
        f"**{sentence(records)}**",
        "",
        "| arm | mismatch | truncated | replay | surviving | collapse, median batch | accuracy at the end "
        "| mean gap at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seen = dict.fromkeys((r["arm"], r["mismatch"], r["truncated"], r["replay"]) for r in records)
    for arm, mismatch, truncated, replay in seen:
        runs = of(records, arm=arm, mismatch=mismatch, truncated=truncated, replay=replay)
        share, low, high = surviving(runs)
        fallen = [r["collapsed"] for r in runs if r["collapsed"] is not None]
        end = np.mean([r["accuracy_by_ten"][-1] for r in runs])
        gap = np.mean([r["gap_by_ten"][-1] for r in runs])
        lines.append(
            f"| {arm} | {mismatch:g} | {'yes' if truncated else 'no'} | {'yes' if replay else 'no'} "
            f"| {share:.2f} [{low:.2f}, {high:.2f}] of {len(runs)} | {f'{np.median(fallen):.0f}' if fallen else '-'} "
            f"| {end:.3f} | {gap:.1e} |"
        )
    lines += ["", "| diagnostic | warned of collapses | median lead, batches | warned in runs that never collapsed |"]
    lines += ["|---|---|---|---|"]
    fallen = [r for r in records if r["collapsed"] is not None]
    well = [r for r in records if r["collapsed"] is None]
    for name in DIAGNOSTICS:
        leads = [r["collapsed"] - r["warned"][name] for r in fallen if r["warned"][name] is not None]
        false = sum(r["warned"][name] is not None for r in well)
        lead = f"{np.median(leads):.0f}" if leads else "-"
        lines.append(f"| {name} | {len(leads)} of {len(fallen)} | {lead} | {false} of {len(well)} |")
    return "\n".join(lines) + "\n"


def picture(records: Sequence[Record], file: Path) -> None:
    """Share of runs not yet collapsed, against batches: a panel per mismatch and correction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = sorted({r["mismatch"] for r in records})
    rows = sorted({(r["truncated"], r["replay"]) for r in records})
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(3.6 * len(columns), 2.1 * len(rows)), squeeze=False)
    for row, (truncated, replay) in enumerate(rows):
        for column, mismatch in enumerate(columns):
            axis = axes[row][column]
            for number, arm in enumerate(dict.fromkeys(r["arm"] for r in records)):
                runs = of(records, arm=arm, mismatch=mismatch, truncated=truncated, replay=replay)
                batches = np.arange(runs[0]["batches"] + 1)
                alive = [sum(r["collapsed"] is None or r["collapsed"] > b for r in runs) for b in batches]
                bounds = np.array([wilson(a, len(runs)) for a in alive])
                axis.step(batches, np.array(alive) / len(runs), where="post", label=arm, color=f"C{number}")
                axis.fill_between(batches, *bounds.T, color=f"C{number}", alpha=0.12, linewidth=0)
            axis.set_ylim(0, 1.04)
            corrections = [name for name, on in (("truncated", truncated), ("replay", replay)) if on]
            axis.set_title(f"mismatch {mismatch:g}, {' and '.join(corrections) or 'no correction'}", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("generation batches of 16 updates", fontsize=9)
    figure.supylabel("runs not collapsed", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
