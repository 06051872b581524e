"""Rewards that rules decide: the form of the response and its answer."""

import dataclasses

from m1jax.rl.tasks.base import Problem, Task, split_response


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What was found out about one response."""

    reward: float
    correct: bool
    formatted: bool


def judge(task: Task, problem: Problem, response: str, *, finished: bool, format_reward: float) -> Judgement:
    """Reward of a response: 1 if `<think>...</think>answer` is right, `format_reward` if only its form is, else 0.

    Args:
        task: decides whether the answer is right.
        problem: what was asked.
        response: the text without its end token.
        finished: whether the response came to its end; one cut at the limit has no form.
        format_reward: in [0, 1).
    """
    parts = split_response(response) if finished else None
    if parts is None:
        return Judgement(0.0, False, False)
    correct = task.correct(problem, parts[1])
    return Judgement(1.0 if correct else format_reward, correct, True)
