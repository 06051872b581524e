"""The statistic and the sentence that follows from it, as the README laid down before the first run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.cispo_vs_rivals.results import Results

LAST, BELOW, TRAILING, DRAWS = 6, 0.02, 5, 10_000


class Ratio(NamedTuple):
    """Batches that DAPO needs over those that an arm needs, geometric mean over seeds."""

    mean: float
    low: float
    high: float
    """of the 95 % bootstrap interval"""
    seeds: int
    censored: int
    """runs of the arm that never got there"""

    def __str__(self) -> str:
        censored = f", {self.censored} never" if self.censored else ""
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}] ({self.seeds} seeds{censored})"


def trailing(accuracy: Sequence[float], width: int = TRAILING) -> Float[np.ndarray, " batches"]:
    """Mean of each batch and those before it, `width` in all; NaN where there are fewer."""
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(accuracy, np.float64)]))
    means = (sums[width:] - sums[:-width]) / width
    return np.concatenate([np.full(width - 1, np.nan), means])


def batches_to(accuracy: Sequence[float], level: float) -> int | None:
    """Batches until the trailing mean is at the level; None: never."""
    there = np.flatnonzero(trailing(accuracy) >= level)
    return int(there[0]) + 1 if len(there) else None


def ratio(dapo: dict[int, Sequence[float]], arm: dict[int, Sequence[float]]) -> Ratio | None:
    """Of accuracies by seed, paired; None without a common seed."""
    logs, censored = [], 0
    for seed in sorted(dapo.keys() & arm.keys()):
        level = float(np.mean(dapo[seed][-LAST:])) - BELOW
        # Its own trailing mean is at the level at the latest where its last batches are all in it, or nearly so.
        reference = batches_to(dapo[seed], level) or len(dapo[seed])
        needed = batches_to(arm[seed], level)
        censored += needed is None
        logs.append(np.log(reference / (needed or len(arm[seed]))))
    if not logs:
        return None
    rng = np.random.default_rng(0)
    means = np.mean(rng.choice(np.array(logs), (DRAWS, len(logs))), axis=1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return Ratio(float(np.exp(np.mean(logs))), float(low), float(high), len(logs), censored)


def of_cell(runs: Results, task: str, arm: str, updates: int) -> Ratio | None:
    """Of one arm against DAPO; with one update per batch CISPO's runs are DAPO's."""
    reference = "cispo" if updates == 1 else "dapo"
    curves = [{s: r["accuracy"] for s, r in runs.of(task, name, updates).items()} for name in (reference, arm)]
    return ratio(*curves)


def sentence(primary: Ratio | None) -> str:
    """The verdict."""
    if primary is None:
        return "No verdict: the primary runs are missing."
    if primary.low >= 1.5:
        said = "CISPO needs about half of DAPO's batches or fewer: the claim holds here"
    elif primary.low > 1:
        said = "CISPO is faster than DAPO, " + (
            "but not twice as fast" if primary.high < 2 else "twice as fast or not is not shown"
        )
    elif primary.high < 1:
        said = "The opposite of the claim: CISPO needs more batches than DAPO"
    else:
        said = "No difference between CISPO and DAPO is shown"
    return f"{said}: DAPO's batches over CISPO's are {primary}."
