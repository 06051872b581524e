"""Figure 1 (right) of the report: FLOPs over generation length for MiniMax-M1, DeepSeek-R1 and Qwen3-235B-A22B.

`figure` mode recomputes the drawn curves; `honest` mode counts what the published configurations do. Run:
    python -m experiments.flops_scaling.figure1
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import tyro

from m1jax.config import ModelConfig
from m1jax.flops import forward_flops

HERE = Path(__file__).parent
M1, R1, QWEN3 = "MiniMax-M1", "DeepSeek-R1", "Qwen3-235B-A22B"
R1_MLA = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
Curve = Callable[[int], float]

# The formulas behind the drawing: every point to 1e-3 (at 1,024 tokens to 5e-3, where the drawing is coarse).
FIGURE: dict[str, Curve] = {
    R1: lambda n: (
        2 * n * (61 * R1_MLA + 64 * (9 * 3 * 7168 * 2048) + 129280 * 7168) + 61 * 128 * (192 + 2 * 128) * n * n
    ),
    QWEN3: lambda n: (
        2 * n * (94 * (2 * 4096 * 64 * 128 + 2 * 4096 * 4 * 128 + 8 * 3 * 4096 * 1536) + 151936 * 4096)
        + 94 * 64 * (128 + 2 * 128) * n * n
    ),
    # 8 softmax and 72 lightning layers, and a lightning cost as if all heads were one of 8,192 channels.
    M1: lambda n: (
        2 * n * (8 * (2 * 6144 * 8192 + 2 * 6144 * 1024) + 72 * 5 * 6144 * 8192 + 80 * 6 * 6144 * 9216 + 200064 * 6144)
        + 72 * 2 * 8192**2 * n
        + 8 * 64 * 384 * n * n
    ),
}


def r1_honest(n: int, *, absorbed: bool) -> float:
    """DeepSeek-R1: 58 expert layers (8 + 1 of 2,048, router of 256) and 3 dense ones (18,432), causal attention.

    `absorbed` is how R1 decodes: every head attends over the 576 compressed channels and reads 512 of them back.
    """
    experts = 58 * (9 * 3 * 7168 * 2048 + 256 * 7168) + 3 * 3 * 7168 * 18432
    per_pair = 576 + 512 if absorbed else 192 + 128
    return 2 * n * (61 * R1_MLA + experts + 129280 * 7168) + 61 * 128 * per_pair * n * (n + 1)


def qwen3_honest(n: int) -> float:
    """Qwen3-235B-A22B with its router (128 experts) and causal attention."""
    layer = 2 * 4096 * 64 * 128 + 2 * 4096 * 4 * 128 + 8 * 3 * 4096 * 1536 + 128 * 4096
    return 2 * n * (94 * layer + 151936 * 4096) + 94 * 64 * 2 * 128 * n * (n + 1)


R1_ABSORBED = R1 + ", absorbed MLA"
HONEST: dict[str, Curve] = {
    R1: lambda n: r1_honest(n, absorbed=False),
    R1_ABSORBED: lambda n: r1_honest(n, absorbed=True),
    QWEN3: qwen3_honest,
    M1: lambda n: forward_flops(ModelConfig.preset("m1-456b"), n),
}


def crossing(ours: Curve, theirs: Curve, ratio: float, limit: int = 2**24) -> int | None:
    """The shortest length from which `ours` stays at or below `ratio` times `theirs`; None if not before `limit`.

    Both are a n + b n^2, so the quotient falls monotonically where ours has the smaller b / a, as here.
    """
    low, high = 1, limit
    if ours(high) > ratio * theirs(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ours(middle) <= ratio * theirs(middle) else (middle + 1, high)
    return low


def deviations(points: Path) -> dict[str, dict[int, float]]:
    """Relative difference of the figure-mode formulas from each point read off the report's drawing."""
    found: dict[str, dict[int, float]] = {name: {} for name in FIGURE}
    with points.open() as file:
        for row in csv.DictReader(file):
            n = int(row["generation_length_tokens"])
            found[row["model"]][n] = FIGURE[row["model"]](n) / float(row["flops"]) - 1
    return found


def table() -> list[dict[str, object]]:
    """One row per comparison: M1 over a rival at three lengths, and where M1 falls to half and a quarter of it."""
    pairs = [("figure", FIGURE, R1), ("figure", FIGURE, QWEN3)]
    pairs += [("honest", HONEST, rival) for rival in (R1, R1_ABSORBED, QWEN3)]
    return [
        {
            "mode": mode,
            "rival": rival,
            "ratio_64k": curves[M1](65_536) / curves[rival](65_536),
            "ratio_100k": curves[M1](102_400) / curves[rival](102_400),
            "ratio_128k": curves[M1](131_072) / curves[rival](131_072),
            "half_from_tokens": crossing(curves[M1], curves[rival], 0.5),
            "quarter_from_tokens": crossing(curves[M1], curves[rival], 0.25),
        }
        for mode, curves, rival in pairs
    ]


def draw(points: Path, picture: Path) -> None:
    """Both modes side by side, with the report's own points in the left one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {M1: "C3", R1: "C0", R1_ABSORBED: "C9", QWEN3: "C7"}
    lengths = list(range(1024, 131_073, 1024))
    _, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, title, curves in zip(axes, ("figure mode: as the report drew it", "honest mode"), (FIGURE, HONEST)):
        for name, curve in curves.items():
            axis.plot([n / 1024 for n in lengths], [curve(n) / 1e16 for n in lengths], label=name, color=colours[name])
        axis.set(title=title, xlabel="generation length (K tokens)")
        axis.grid(alpha=0.3)
    with points.open() as file:
        for row in csv.DictReader(file):
            x, y = int(row["generation_length_tokens"]) / 1024, float(row["flops"]) / 1e16
            axes[0].plot(x, y, ".", color=colours[row["model"]])
    axes[0].set_ylabel("FLOPs (1e16)")
    axes[0].set_ylim(0, 12)
    axes[1].legend()
    plt.tight_layout()
    plt.savefig(picture, dpi=110)
    plt.close()


@dataclasses.dataclass
class Config:
    """Where the report's points are and where the results go."""

    points: Path = HERE / "figure1_right.csv"
    out: Path = HERE


def main(config: Config) -> None:
    worst = {name: max(map(abs, errors.values())) for name, errors in deviations(config.points).items()}
    rows = table()
    for row in rows:
        ratios = "  ".join(f"{row[key]:6.1%}" for key in ("ratio_64k", "ratio_100k", "ratio_128k"))
        print(f"{row['mode']:7} M1 / {row['rival']:28} {ratios}  half from {row['half_from_tokens']}", end="")
        print(f"  quarter from {row['quarter_from_tokens']}")
    print("largest deviation from the drawn points:", {name: f"{value:.1e}" for name, value in worst.items()})
    result = {"ratios": rows, "largest_deviation_from_drawing": worst}
    (config.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(config.points, config.out / "figure1.png")


if __name__ == "__main__":
    main(tyro.cli(Config))
