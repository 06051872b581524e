"""What a set of scored groups says: figures for the record, and samples for people."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m1jax.disk import write_atomically
from m1jax.rl.advantages import informative
from m1jax.rl.tasks import split_response
from m1jax.rl.types import Episode, Scored


def summary(scored: Sequence[Scored]) -> dict[str, float]:
    """Rewards, their parts and their spread, accuracy, both by family too, lengths in tokens, and how responses ended.

    `zero_variance` is the share of groups whose raw rewards are all equal, `format` that of responses in the form
    `<think>...</think>answer`.
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


def write_samples(scored: Sequence[Scored], path: Path) -> None:
    """Some problems with some responses, as Markdown."""
    lines: list[str] = []
    for one in scored[:8]:
        lines += [f"## `{one.group.problem.prompt}`", f"expected: `{one.group.problem.answer}`", ""]
        for reward, episode in list(zip(one.rewards, one.group.episodes))[:4]:
            lines.append(f"- reward {reward:.2f}: " + " … ".join(f"`{text}`" for text in episode.turns))
        lines.append("")
    write_atomically(path, "\n".join(lines))
