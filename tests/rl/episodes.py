"""Episodes and groups made by hand."""

import numpy as np

from m1jax.rl.tasks import Problem
from m1jax.rl.types import Episode, Group, Scored


def episode(text="", *, prompt=(1, 2), tokens=(5, 6, 7), written=None, logp=-1.0, finish="stop") -> Episode:
    tokens = np.array(tokens, np.int32)
    written = np.ones(len(tokens), bool) if written is None else np.array(written)
    return Episode(
        prompt=np.array(prompt, np.int32),
        tokens=tokens,
        written=written,
        logp=np.where(written, np.float32(logp), np.float32(0)),
        version=np.where(written, 0, -1).astype(np.int32),
        turns=(text,),
        finish=finish,
    )


def scored(raw, *, rewards=None, problem=None, episodes=None) -> Scored:
    raw = np.array(raw, np.float32)
    return Scored(
        group=Group(problem or Problem("q", "a"), tuple(episodes or [episode() for _ in raw])),
        raw=raw,
        rewards=raw if rewards is None else np.array(rewards, np.float32),
        parts={"answer": raw, "format": raw * 0},
        correct=raw >= 1,
    )
