"""The table and the picture of what `scaling` left in a folder, the planner's figures beside the measured ones.

python -m experiments.scaling.report RESULTS [--out FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.scaling.cases import Case
from m1jax.plan.expected import expected
from m1jax.plan.hardware import CHIPS
from m1jax.plan.memory import memory
from m1jax.plan.setup import Setup
from m1jax.sharding import parse_mesh

HERE = Path(__file__).parent
Row = dict[str, Any]


def read(folder: Path) -> dict[str, Row]:
    """Name -> what was measured, and what the planner says."""
    read = (json.loads(file.read_text()) for file in folder.glob("*.json"))
    found = {row["name"]: row for row in read if "tokens/s" in row}
    names = {field.name for field in dataclasses.fields(Case)}
    for row in found.values():
        case = Case(**{key: value for key, value in row.items() if key in names})
        setup = Setup(
            model=case.config, task="sft", mesh=parse_mesh(case.mesh), context=case.tokens,
            rows=case.rows // case.micro_batches, micro_batches=case.micro_batches, sequences=case.sequences,
            remat="cheap" if case.remat == "auto" else case.remat,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        rates = next(chip.rates for name, chip in CHIPS.items() if name.upper() in row["device"])
        assert rates is not None
        row["expected ms"] = 1e3 * sum(expected(setup, rates).values())
        row["planned GB"] = sum(memory(setup, "gpu").values()) / 1e9
        one = found.get(case.beside)
        row["times one card"] = row["tokens/s"] / one["tokens/s"] if one else None
        same = found.get(case.same)
        for name in ("loss", "gradient norm"):
            row[f"{name} differs"] = abs(row[name] / same[name] - 1) if same and same is not row else None
    return found


def table(rows: dict[str, Row]) -> str:
    """Markdown."""
    lines = [
        "| | rows x tokens | ms | expected | tokens/s | x one card | MFU | collectives, alone | GB | planned |"
        " loss, gradient differ by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        trace = row.get("trace ms") or {}
        shares = [f"{100 * trace[kind] / trace['span']:.0f} %" for kind in ("collectives", "exposed") if trace]
        times = row["times one card"]
        differ = [f"{row[kind]:.0e}" for kind in ("loss differs", "gradient norm differs") if row[kind] is not None]
        cells = [
            name,
            f"{row['rows']} x {row['tokens']:,}",
            f"{row['ms']:.1f}",
            f"{row['expected ms']:.0f} ({100 * (row['expected ms'] / row['ms'] - 1):+.0f} %)",
            f"{row['tokens/s']:,.0f}",
            f"{times:.2f} ({100 * times / row['cards']:.0f} %)" if times else "",
            f"{row['MFU %']:.1f} %",
            ", ".join(shares) if row["cards"] > 1 else "",
            f"{row.get('program GB', float('nan')):.1f}",
            f"{row['planned GB']:.1f}",
            ", ".join(differ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: dict[str, Row], path: Path) -> None:
    """Tokens per second against one card's, measured and expected, over the number of cards: weak scaling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    most = max(row["cards"] for row in rows.values())
    axis.plot([1, most], [1, most], color="lightgray", label="ideal")
    for number, kind in enumerate(("data", "fsdp", "expert", "tensor", "sequence")):
        pure = [row for name, row in rows.items() if row["mesh"] == name and name == f"{kind}={row['cards']}"]
        points = sorted((row["cards"], row["times one card"]) for row in pure if row["times one card"])
        if points:
            axis.plot(*zip((1, 1.0), *points), marker="o", color=f"C{number}", label=kind)
    for name, row in rows.items():
        if row["mesh"] == name and "," in name and row["times one card"]:
            axis.plot(row["cards"], row["times one card"], marker="D", color="black")
            axis.annotate(
                name, (row["cards"], row["times one card"]), textcoords="offset points", xytext=(-8, -4), ha="right"
            )
    axis.set_xlabel("cards")
    axis.set_ylabel("tokens/s, times one card's")
    axis.set_xticks([2**i for i in range(most.bit_length())])
    axis.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    chosen = parser.parse_args()
    rows = read(chosen.results)
    order = sorted(
        rows.values(), key=lambda row: (row["preset"] != "m1-2b", row["cards"], row["processes"], row["name"])
    )
    rows = {row["name"]: row for row in order}
    chosen.out.joinpath("result.json").write_text(json.dumps(list(rows.values()), indent=1))
    chosen.out.joinpath("table.md").write_text(table(rows))
    picture(rows, chosen.out / "scaling.png")
    print(table(rows))


if __name__ == "__main__":
    main()
