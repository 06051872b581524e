"""Scored groups as arrays that a checkpoint keeps, to the bit."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m1jax.rl.tasks.base import Problem
from m1jax.rl.types import Episode, Group, Scored

BY_TOKEN = ("tokens", "written", "logp", "version")


def to_arrays(scored: Sequence[Scored]) -> dict[str, np.ndarray]:
    """Everything about them: what tokens have, one group behind the other; texts and the rest as JSON in bytes."""
    episodes = [episode for group in scored for episode in group.group.episodes]
    prompts = [episode.prompt for episode in episodes]
    said = [
        {
            "problem": dataclasses.asdict(group.group.problem),
            "number": group.group.number,
            "episodes": [[list(e.turns), e.finish, e.ended, e.reward, e.failure] for e in group.group.episodes],
            "parts": list(group.parts),
        }
        for group in scored
    ]
    arrays = {
        "said": np.frombuffer(json.dumps(said).encode(), np.uint8),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int64),
        "lengths": np.array([len(episode.tokens) for episode in episodes], np.int64),
        "prompt": _joined(prompts, np.int32),
        "raw": _joined([group.raw for group in scored], np.float32),
        "rewards": _joined([group.rewards for group in scored], np.float32),
        "correct": _joined([group.correct for group in scored], np.bool_),
        "parts": _joined([part for group in scored for part in group.parts.values()], np.float32),
    }
    for name in BY_TOKEN:
        found = [getattr(episode, name) for episode in episodes]
        arrays[name] = _joined(found, found[0].dtype if found else np.int32)
    if routes := [episode.routes for episode in episodes if episode.routes is not None]:
        arrays["routed"] = np.array([episode.routes is not None for episode in episodes])
        arrays["routes"] = np.concatenate(routes)
    return arrays


def from_arrays(arrays: Mapping[str, Any]) -> list[Scored]:
    """The inverse."""
    said = json.loads(np.asarray(arrays["said"]).tobytes().decode())
    prompt_lengths, lengths = np.asarray(arrays["prompt_lengths"]), np.asarray(arrays["lengths"])
    prompts = _cut(arrays["prompt"], prompt_lengths)
    by_token = {name: _cut(arrays[name], lengths) for name in BY_TOKEN}
    routed = np.asarray(arrays.get("routed", np.zeros(len(lengths), bool)))
    routes = iter(_cut(arrays["routes"], (prompt_lengths + lengths - 1)[routed]) if routed.any() else [])
    sizes = np.array([len(group["episodes"]) for group in said], np.int64)
    of_groups = {name: _cut(arrays[name], sizes) for name in ("raw", "rewards", "correct")}
    parts = iter(_cut(arrays["parts"], np.repeat(sizes, [len(group["parts"]) for group in said])))
    scored, episode = [], 0
    for number, group in enumerate(said):
        episodes = []
        for turns, finish, ended, reward, failure in group["episodes"]:
            episodes.append(
                Episode(
                    prompt=prompts[episode],
                    **{name: by_token[name][episode] for name in BY_TOKEN},
                    turns=tuple(turns),
                    finish=finish,
                    ended=ended,
                    reward=reward,
                    failure=failure,
                    routes=next(routes) if routed[episode] else None,
                )
            )
            episode += 1
        scored.append(
            Scored(
                group=Group(Problem(**group["problem"]), tuple(episodes), group["number"]),
                **{name: values[number] for name, values in of_groups.items()},
                parts={name: next(parts) for name in group["parts"]},
            )
        )
    return scored


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)


def _cut(array: Any, sizes: np.ndarray) -> list[np.ndarray]:
    return np.split(np.asarray(array), np.cumsum(sizes)[:-1]) if len(sizes) else []
