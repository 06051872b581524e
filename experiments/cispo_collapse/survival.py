"""When a run collapses, what warned of it, and how sure a share of surviving runs is."""

import math

import numpy as np
from jaxtyping import Float

from experiments.cispo_vs_rivals.verdict import trailing

DIAGNOSTICS = ("entropy", "clipped", "ratio_max", "kl", "grad_norm", "gap")
WIDTH, NOW, BEFORE, FACTOR = 10, 5, 25, 3.0

Series = Float[np.ndarray, " batches"]


def collapse(accuracy: Series) -> int | None:
    """The batch, counted from 1, where the mean of ten is first below half of the best such mean before it."""
    means = trailing(accuracy.tolist(), WIDTH)
    best = np.fmax.accumulate(means)
    fallen = np.flatnonzero(means[1:] < best[:-1] / 2)
    return int(fallen[0]) + 2 if len(fallen) else None


def warning(values: Series) -> int | None:
    """The batch, counted from 1, where the mean of five first leaves [1/3, 3] times the median of the 25 before."""
    for now in range(BEFORE + NOW, len(values) + 1):
        mean = np.nanmean(values[now - NOW : now]) if np.isfinite(values[now - NOW : now]).any() else np.nan
        usual = np.nanmedian(values[now - NOW - BEFORE : now - NOW])
        if not usual / FACTOR <= mean <= usual * FACTOR:
            return now
    return None


def wilson(survived: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    share, weight = survived / total, z * z / total
    middle, half = share + weight / 2, z * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)
