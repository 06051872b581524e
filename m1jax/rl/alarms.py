"""Signs of a training that goes wrong, in words, with what to try.

Each alarm compares the newest generation batch with those before it; thresholds are rules of thumb, no measurements.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

Record = Mapping[str, Any]
"""a line of metrics.jsonl"""

BEFORE = 8
"""generation batches that the newest is compared with"""


def alarms(records: Sequence[Record]) -> list[str]:
    """What is to be said of the newest of a training's records, oldest first; nothing where all is well."""
    if not records:
        return []
    newest, before = records[-1], records[:-1][-BEFORE:]
    return [said for alarm in ALARMS if (said := alarm(newest, before)) is not None]


def equal_rewards(newest: Record, before: Sequence[Record]) -> str | None:
    share = newest.get("zero_variance")
    if share is None or share < 0.9 or not newest.get("updates"):  # without an update it has been said
        return None
    if newest.get("kept", 0) >= newest.get("asked", 1):  # about a batch's baseline they teach
        return None
    return (
        f"{share:.0%} of the groups have rewards that are all equal and teach nothing: try problems of another "
        "difficulty (a pass-rate filter, --retire-above), more --samples or more --rounds"
    )


def short_responses(newest: Record, before: Sequence[Record]) -> str | None:
    usual, now = _mean(before, "length"), newest.get("length")
    if usual is None or now is None or now >= usual / 2:
        return None
    return (
        f"responses have collapsed from {usual:.0f} to {now:.0f} tokens: look at samples; try a smaller "
        "--overlong-buffer, a lower --learning-rate, or a higher --format-reward"
    )


def numerics(newest: Record, before: Sequence[Record]) -> str | None:
    now = newest.get("pearson")
    if now is None or now >= 0.99:
        return None
    said = f"trainer and sampler agree on token probabilities to a correlation of {now:.4f} only"
    if any(newest.get(name) for name in ("staleness", "older_tokens", "waited")):
        return (
            f"{said}: it was older parameters that wrote, and the policy has moved since; try a lower --learning-rate, "
            "fewer --updates, a smaller --staleness or --fifo-window"
        )
    return f"{said}: try --old-policy trainer --correction truncated, --replay-routes; the head must be float32 in both"


def no_entropy(newest: Record, before: Sequence[Record]) -> str | None:
    now, usual = newest.get("entropy"), _mean(before, "entropy")
    if now is None or usual is None or now >= 0.02 or now >= usual / 2:
        return None
    return (
        f"entropy has fallen from {usual:.3f} to {now:.3f} nats per token, and little is left to explore: try a higher "
        "--max-weight or --temperature, harder problems, a lower --learning-rate"
    )


def clipped_mass(newest: Record, before: Sequence[Record]) -> str | None:
    worst = max((newest.get(f"clipped_mass_{way}") or 0.0 for way in ("up", "down")), default=0.0)
    if worst < 0.2:
        return None
    return (
        f"{worst:.0%} of the loss's mass lies in clipped tokens, the policy is far from the one that generated: try "
        "fewer --updates, a lower --learning-rate, a smaller --staleness"
    )


def few_effective(newest: Record, before: Sequence[Record]) -> str | None:
    now = newest.get("effective")
    if now is None or now >= 0.3:
        return None
    return (
        f"importance weights leave {now:.0%} of the tokens effective: a few tokens decide the updates; try fewer "
        "--updates, a lower --learning-rate, or --correction truncated"
    )


def truncated(newest: Record, before: Sequence[Record]) -> str | None:
    now = newest.get("finish_length")
    if now is None or now < 0.5:
        return None
    return (
        f"{now:.0%} of the responses were cut at the limit and can earn nothing: try a larger --max-new-tokens, or "
        "--overlong-buffer"
    )


ALARMS: Sequence[Callable[[Record, Sequence[Record]], str | None]] = (
    equal_rewards,
    short_responses,
    numerics,
    no_entropy,
    clipped_mass,
    few_effective,
    truncated,
)


def _mean(records: Sequence[Record], name: str) -> float | None:
    found = [record[name] for record in records if record.get(name) is not None]
    return fmean(found) if found else None
