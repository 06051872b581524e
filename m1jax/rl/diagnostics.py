"""What the updates of a generation batch say, as figures for the record."""

from collections.abc import Sequence

from m1jax.rl.types import Scored
from m1jax.train import statistics
from m1jax.train.session import Figures
from m1jax.train.statistics import Histogram, Stats

BY_UPDATE = (
    *("ratio_max", "effective", "entropy", "kl_k1", "kl_k3", "grad_norm", "kl_reference"),
    *("clipped", "clipped_up", "clipped_down", "clipped_mass_up", "clipped_mass_down"),
)
"""Statistics also recorded for each update: they show how far off-policy the late ones are."""
QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}
"""of log-ratios, recorded for each update"""
NUMERICS = ("pearson", "sampler_gap")
"""Of the first update alone: there the policy is still the sampler's, and whatever differs is numerics."""


def of_updates(updates: Sequence[Stats | None]) -> Figures:
    """One record of the statistics of a generation batch's updates; those left out (None) only count."""
    made = [stats for stats in updates if stats is not None]
    record: dict[str, float | Sequence[float | None] | None] = {}
    if len(made) < len(updates):
        record["skipped"] = len(updates) - len(made)
    if not made:
        return record
    for name in BY_UPDATE:
        if name in made[0]:
            record[f"{name}_by_update"] = [None if stats is None else stats[name].value() for stats in updates]
    for name, share in QUANTILES.items():
        record[f"log_ratio_{name}_by_update"] = [_quantile(stats, share) for stats in updates]
    whole = statistics.merge(made)
    left_out = ("gap_max", "log_ratio", *NUMERICS)
    record |= {name: value for name, value in statistics.values(whole).items() if name not in left_out}
    record |= {f"log_ratio_{name}": _quantile(whole, share) for name, share in QUANTILES.items()}
    if updates[0] is not None:
        record |= {name: updates[0][name].value() for name in NUMERICS}
    return record


def nothing_learnt(scored: Sequence[Scored]) -> str:
    """What to say of a generation batch whose groups all agree, and what to try."""
    right = sum(bool(group.correct.all()) for group in scored)
    wrong = sum(not group.correct.any() for group in scored)
    if right > wrong:
        advice = "harder problems, or a higher --temperature"
    else:
        advice = "easier problems, a model that was fine-tuned on such answers, more --samples or --max-new-tokens"
    return (
        f"no update: the responses to each of {len(scored)} problems were all rewarded alike ({right} problems all "
        f"right, {wrong} all wrong), which leaves nothing to learn from; try {advice}"
    )


def _quantile(stats: Stats | None, share: float) -> float | None:
    histogram = None if stats is None else stats["log_ratio"]
    return histogram.quantile(share) if isinstance(histogram, Histogram) else None
