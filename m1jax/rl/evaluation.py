"""What a set of scored groups says: figures for the record, and samples for people."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m1jax.disk import write_atomically
from m1jax.rl.types import Scored


def summary(scored: Sequence[Scored]) -> dict[str, float]:
    """Mean reward and its parts, accuracy (also by family), and lengths in tokens."""
    lengths = np.concatenate([group.lengths for group in scored])
    episodes = [episode for group in scored for episode in group.group.episodes]
    correct = np.concatenate([group.correct for group in scored])
    families = np.concatenate([np.full(len(group.correct), group.group.problem.family) for group in scored])
    figures = {
        "reward": float(np.mean(np.concatenate([group.rewards for group in scored]))),
        "accuracy": float(correct.mean()),
        "length": float(lengths.mean()),
        "length_p99": float(np.percentile(lengths, 99)),
        "unfinished": float(np.mean([episode.finish == "length" for episode in episodes])),
    }
    for name in scored[0].parts:
        figures[f"reward_{name}"] = float(np.mean(np.concatenate([group.parts[name] for group in scored])))
    for family in sorted(set(families.tolist())):
        figures[f"accuracy_{family}"] = float(correct[families == family].mean())
    return figures


def write_samples(scored: Sequence[Scored], path: Path) -> None:
    """Some problems with some responses, as Markdown."""
    lines: list[str] = []
    for one in scored[:8]:
        lines += [f"## `{one.group.problem.prompt}`", f"expected: `{one.group.problem.answer}`", ""]
        for reward, episode in list(zip(one.rewards, one.group.episodes))[:4]:
            lines.append(f"- reward {reward:.2f}: " + " … ".join(f"`{text}`" for text in episode.turns))
        lines.append("")
    write_atomically(path, "\n".join(lines))
