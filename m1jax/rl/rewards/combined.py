"""Judges by name, and several with weights."""

from collections.abc import Sequence

from m1jax.rl.rewards.function import FunctionJudge
from m1jax.rl.rewards.judge import Judge, Verdict
from m1jax.rl.rewards.rules import RuleJudge
from m1jax.rl.tasks.base import Problem, Task
from m1jax.rl.types import Episode
from m1jax.rl.weights import Combination, parse

RULES = "rules"


class CombinedJudge:
    """The weighted sum of several verdicts; right is what the first judge says is right."""

    def __init__(self, judges: Sequence[Judge], weights: Sequence[float]):
        self._judges, self._weights = judges, weights

    def __call__(self, problem: Problem, episode: Episode) -> Verdict:
        verdicts = [judge(problem, episode) for judge in self._judges]
        answer = sum(weight * verdict.answer for weight, verdict in zip(self._weights, verdicts))
        form = sum(weight * verdict.format for weight, verdict in zip(self._weights, verdicts))
        return Verdict(answer, form, verdicts[0].correct)


def get_judge(combination: Combination, task: Task, format_reward: float) -> Judge:
    """A judge by name, or several with weights: `rules=1+mine.py:brevity=0.2`.

    A name is `rules`, the task's own; or a plug-in's, `FILE.py:name` or an entry point of `m1jax.rewards`.

    Raises:
        UserError: there is no such reward, one twice, or no weight.
    """
    weights = parse("reward", combination)
    judges = [RuleJudge(task, format_reward) if name == RULES else FunctionJudge(name) for name in weights]
    if list(weights.values()) == [1.0]:
        return judges[0]
    return CombinedJudge(judges, list(weights.values()))
