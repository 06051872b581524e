"""What a set of scored groups says: figures for the record, marks with intervals, and samples for people."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Float, Int

from m1jax.disk import write_atomically
from m1jax.rl.advantages import informative
from m1jax.rl.rewards import Judge, RewardRecipe, score
from m1jax.rl.rollout import Draw, Rollout
from m1jax.rl.tasks.base import Same, same_text, split_response
from m1jax.rl.types import Ended, Episode, Scored

RESAMPLES = 2000
"""of the bootstrap"""
NORMAL = 1.959964
"""the normal distribution lies within so many deviations with 95 %"""


def summary(scored: Sequence[Scored]) -> dict[str, float]:
    """Rewards, their parts and their spread, accuracy, both by family too, lengths in tokens, and how responses ended.

    `zero_variance` is the share of groups whose raw rewards are all equal, `format` that of responses in the form
    `<think>...</think>answer`. Where there were several turns, how many and why episodes ended.
    """
    lengths = np.concatenate([group.lengths for group in scored])
    episodes = [episode for group in scored for episode in group.group.episodes]
    correct = np.concatenate([group.correct for group in scored])
    rewards = np.concatenate([group.rewards for group in scored])
    families = np.concatenate([np.full(len(group.correct), group.group.problem.family) for group in scored])
    finishes = [episode.finish for episode in episodes]
    figures = {
        "reward": float(np.mean(rewards)),
        "reward_std": float(np.std(rewards)),
        "accuracy": float(correct.mean()),
        "format": float(np.mean([well_formed(episode) for episode in episodes])),
        "zero_variance": float(np.mean([not informative(group.raw) for group in scored])),
        "length": float(lengths.mean()),
        "length_p50": float(np.percentile(lengths, 50)),
        "length_p99": float(np.percentile(lengths, 99)),
        "length_max": float(lengths.max()),
        "unfinished": float(np.mean([finish != "stop" for finish in finishes])),
    }
    for finish in ("stop", "length", "repetition"):
        figures[f"finish_{finish}"] = finishes.count(finish) / len(finishes)
    if any(len(episode.turns) > 1 for episode in episodes):
        figures["turns"] = float(np.mean([len(episode.turns) for episode in episodes]))
        for ended in get_args(Ended)[:-1]:  # the last, failed, is left out before
            figures[f"ended_{ended}"] = float(np.mean([episode.ended == ended for episode in episodes]))
    for name in scored[0].parts:
        figures[f"reward_{name}"] = float(np.mean(np.concatenate([group.parts[name] for group in scored])))
    for family in sorted(set(families.tolist())):
        mine = families == family
        figures[f"accuracy_{family}"] = float(correct[mine].mean())
        figures[f"reward_of_{family}"] = float(rewards[mine].mean())
        figures[f"reward_std_of_{family}"] = float(rewards[mine].std())
    return figures


def well_formed(episode: Episode) -> bool:
    """Whether it came to its end, in the form `<think>...</think>answer`."""
    return episode.finish == "stop" and split_response(episode.turns[-1]) is not None


def examine(
    rollout: Rollout,
    judge: Judge,
    recipe: RewardRecipe,
    *,
    seed: int,
    starts: Iterable[int],
    draw: Draw,
    max_tokens: int,
) -> list[Scored]:
    """Attempts at held-out problems, judged; P problems from each of `starts` on."""
    scored: list[Scored] = []
    for first in starts:
        groups = rollout("heldout", seed, first, draw=draw)
        scored += score(groups, judge, recipe, max_tokens=max_tokens)
    return scored


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over problems, and where it lies with a confidence of 95 %."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, " problems"]) -> "Interval":
        """By bootstrap over problems: attempts at one problem depend on each other. Where all problems have the same
        value (none right, all right, a single problem), which a bootstrap would be certain of, Wilson's score interval.

        Args:
            values: of each problem, in [0, 1].
        """
        if (values == values[0]).all():
            return cls(float(values[0]), *_wilson(float(values[0]), len(values)))
        drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
        return cls(float(values.mean()), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Where a share lies that was seen in so many independent trials (Wilson 1927, JASA 22, 209)."""
    weight = NORMAL**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclasses.dataclass(frozen=True)
class Marks:
    """What a policy can do, measured on some problems with k attempts at each (of the problem with the fewest)."""

    problems: int
    k: int
    average: Interval
    """avg@k: share of right attempts"""
    passed: dict[int, Interval]
    """n -> pass@n: whether one of n attempts is right, for n = 1, 2, 4, ... up to k"""
    majority: Interval
    """whether the commonest answer is right; attempts without an answer have no vote"""

    def figures(self) -> dict[str, float]:
        """For the record."""
        return {
            "accuracy_low": self.average.low,
            "accuracy_high": self.average.high,
            f"pass_at_{self.k}": self.passed[self.k].mean,
            "majority": self.majority.mean,
        }


def marks(scored: Sequence[Scored], same: Same = same_text) -> Marks:
    """Of groups of which at least one has an episode; `same` says which answers vote for the same."""
    scored = [group for group in scored if len(group.correct)]
    attempts = np.array([len(group.correct) for group in scored])
    right = np.array([int(group.correct.sum()) for group in scored])
    k = int(attempts.min())
    steps = sorted({2**i for i in range(k.bit_length())} | {k})
    return Marks(
        problems=len(scored),
        k=k,
        average=Interval.of(right / attempts),
        passed={n: Interval.of(pass_at(n, attempts, right)) for n in steps},
        majority=Interval.of(np.array([majority(group, same) for group in scored])),
    )


def pass_at(
    n: int, attempts: Int[np.ndarray, " problems"], right: Int[np.ndarray, " problems"]
) -> Float[np.ndarray, " problems"]:
    """Chance that one of n attempts drawn from those made is right, unbiased: 1 - C(attempts - right, n) / C(attempts,
    n) (Chen et al., arXiv 2107.03374, eq. 1)."""
    return np.array([1 - math.comb(int(a - r), n) / math.comb(int(a), n) for a, r in zip(attempts, right)])


def majority(group: Scored, same: Same = same_text) -> float:
    """1 where the commonest answer is right, 0 where it is not; of several as common, their mean."""
    spelt: Counter[str] = Counter()
    is_right: dict[str, bool] = {}
    for episode, correct in zip(group.group.episodes, group.correct):
        parts = split_response(episode.turns[-1])
        answer = parts[1] if parts else episode.turns[-1].strip()
        if episode.finish == "stop" and answer:
            spelt[answer] += 1
            is_right[answer] = bool(correct)
    if len(set(is_right.values())) < 2:
        return float(any(is_right.values()))  # whichever is the commonest
    votes: Counter[str] = Counter()  # by one spelling of each answer
    for answer, count in spelt.items():
        known = (one for one in votes if is_right[one] == is_right[answer])
        votes[next((one for one in known if same(group.group.problem, one, answer)), answer)] += count
    most = max(votes.values())
    leading = [is_right[answer] for answer, count in votes.items() if count == most]
    return sum(leading) / len(leading)


def write_samples(scored: Sequence[Scored], path: Path) -> None:
    """Some problems with some responses, as Markdown."""
    lines: list[str] = []
    for one in scored[:8]:
        lines += [f"## `{one.group.problem.prompt}`", f"expected: `{one.group.problem.answer}`", ""]
        for reward, episode in list(zip(one.rewards, one.group.episodes))[:4]:
            lines.append(f"- reward {reward:.2f}: " + " … ".join(f"`{text}`" for text in episode.turns))
        lines.append("")
    write_atomically(path, "\n".join(lines))
