"""A picture of bytes per device against a chip's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

GB = 1e9


def draw(
    bars: Mapping[str, Mapping[str, float]], limits: Mapping[str, float], path: Path, seen: Mapping[str, float]
) -> None:
    """One stacked bar per name of `bars` (kind -> bytes), with a line at its limit and a mark where a compiler's figure
    is in `seen`; written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(bars)
    kinds = list(dict.fromkeys(kind for parts in bars.values() for kind in parts))
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.6 * len(names)))
    left = [0.0] * len(names)
    for number, kind in enumerate(kinds):
        widths = [bars[name].get(kind, 0.0) / GB for name in names]
        axis.barh(names, widths, left=left, label=kind, color=f"C{number}", height=0.6)
        left = [a + b for a, b in zip(left, widths)]
    for row, name in enumerate(names):
        axis.plot([limits[name] / GB] * 2, [row - 0.42, row + 0.42], color="black", linewidth=2)
        if name in seen:
            axis.plot(seen[name] / GB, row, marker="D", color="black", markersize=6)
    axis.plot([], [], color="black", linewidth=2, label="memory of the chip")
    if seen:
        axis.plot([], [], "kD", label="the compiler's figure")
    axis.invert_yaxis()
    axis.set_xlabel("GB per device")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35 if len(names) < 3 else -0.15), ncols=4, fontsize="small")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
