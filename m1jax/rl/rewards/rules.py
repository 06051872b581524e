"""Rewards that rules decide: the form of the response and its answer."""

from m1jax.rl.rewards.judge import Verdict
from m1jax.rl.tasks.base import Problem, Task, split_response
from m1jax.rl.types import Episode


class RuleJudge:
    """1 if the last turn, `<think>...</think>answer`, is right; `format_reward` if only its form is; else 0.

    An episode that was cut at the limit has no form. Where the environment rewards, its reward counts instead, and is
    right from 1 on.

    Args:
        task: decides whether the answer is right.
        format_reward: in [0, 1).
    """

    def __init__(self, task: Task, format_reward: float):
        self._task, self._format_reward = task, format_reward

    def __call__(self, problem: Problem, episode: Episode) -> Verdict:
        if episode.reward is not None:
            return Verdict(episode.reward, 0.0, episode.reward >= 1)
        parts = split_response(episode.turns[-1]) if episode.finish == "stop" else None
        if parts is None:
            return Verdict(0.0, 0.0, False)
        if self._task.correct(problem, parts[1]):
            return Verdict(1.0, 0.0, True)
        return Verdict(0.0, self._format_reward, False)
