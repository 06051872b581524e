"""How often the policy solves each problem, before training: what it never or nearly always solves teaches little
(MiniMax-M1 report, section 4.1.1: 0 < pass rate < 0.9 was kept)."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from m1jax import processes
from m1jax.chat import Tokenizer
from m1jax.disk import write_atomically
from m1jax.errors import UserError
from m1jax.model import MiniMaxM1
from m1jax.rl.curriculum import Curriculum, Stage
from m1jax.rl.environment import MakeEnvironment, environment_of
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.rewards import Judge, RewardRecipe, score
from m1jax.rl.rollout import GenerationRecipe, Rollout
from m1jax.rl.tasks import Mixture, Problem, Split, Task, UserProblems
from m1jax.rl.tasks.base import same_of
from m1jax.rl.types import Group
from m1jax.train.run import plain

log = logging.getLogger(__name__)

BELOW = 0.9
"""a rate that is kept is above zero and below this"""
_ADVICE = "take easier or harder ones, more --samples"


class PassRate(NamedTuple):
    """What came of the attempts at one problem."""

    prompt: str
    correct: int
    attempts: int
    """that could be judged"""

    @property
    def kept(self) -> bool:
        return 0 < self.correct < BELOW * self.attempts


def attempts(
    model: MiniMaxM1,
    task: Task,
    tokenizer: Tokenizer,
    recipe: GenerationRecipe,
    seed: int,
    environment: MakeEnvironment | None = None,
) -> Callable[[int], Sequence[Group]]:
    """A policy's attempts at the training problems of a seed, for `estimate`."""
    graph, params = nnx.split(model)
    generator = EngineGenerator(
        graph,
        prompts=recipe.prompts,
        samples=recipe.samples,
        prompt_tokens=recipe.max_prompt_tokens,
        new_tokens=recipe.max_new_tokens,
    )
    generator.load(params, 0)
    rollout = Rollout(task, tokenizer, generator, recipe, environment)
    return lambda first: rollout("train", seed, first)


def estimate(attempt: Callable[[int], Sequence[Group]], judge: Judge, problems: int) -> dict[Problem, PassRate]:
    """Lets the policy attempt training problems, until so many have been asked.

    Args:
        attempt: number of the first problem -> groups for it and those that follow, as `Rollout` makes them of the
            training split.
        judge: what is right.
        problems: at least so many; one that comes up again is counted together.

    Returns:
        In the order in which the problems came up.
    """
    found: dict[Problem, PassRate] = {}
    asked = 0
    while asked < problems:
        groups = attempt(asked)
        asked += len(groups)
        for scored in score(groups, judge, RewardRecipe(), max_tokens=1):
            problem = scored.group.problem
            before = found.get(problem, PassRate(problem.prompt, 0, 0))
            right, all_of_them = int(scored.correct.sum()), len(scored.correct)
            found[problem] = PassRate(problem.prompt, before.correct + right, before.attempts + all_of_them)
    return found


class Selected:
    """A task whose training problems are only these, those of each source in an order shuffled anew for every pass;
    held-out problems stay.

    Args:
        task: where they are from.
        problems: at least one.
        stages: when each of its sources weighs how much (`curriculum.stages_of`); one that none of the problems is from
            is left out.

    Raises:
        UserError: there are none, or none in a stage.
    """

    def __init__(self, task: Task, problems: Sequence[Problem], stages: Sequence[Stage]):
        if not problems:
            raise UserError(
                f"{task.name}: none of its problems has a pass rate above 0 and below {BELOW}; {_ADVICE}, or train "
                "without the filter"
            )
        self.name, self.environment, self.same = task.name, environment_of(task), same_of(task)
        several = isinstance(task, Mixture | UserProblems)
        self._task, self._problems = task, task.by_part(problems) if several else [problems]
        names = task.parts if several else [task.name]
        if empty := [name for name, mine in zip(names, self._problems) if not mine]:
            log.warning("%s: left out, not one problem has a pass rate above 0 and below %s", ", ".join(empty), BELOW)
        left = [(start, [w if mine else 0.0 for w, mine in zip(weights, self._problems)]) for start, weights in stages]
        for start, weights in left:
            if not any(weights):
                raise UserError(
                    f"curriculum: from problem {start} on no problem has a pass rate above 0 and below {BELOW}; "
                    f"{_ADVICE}, more --pass-rate-problems, or other weights"
                )
        self._turns = Curriculum(left, len(names))

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        if split == "heldout":
            return self._task.problem(split, seed, index)
        source, number = self._turns[index]
        problems = self._problems[source]
        epoch, place = divmod(number, len(problems))
        entropy = [seed, epoch] if source < 1 else [seed, epoch, source]
        return problems[np.random.default_rng(entropy).permutation(len(problems))[place]]

    def correct(self, problem: Problem, answer: str) -> bool:
        return self._task.correct(problem, answer)


def select(
    task: Task,
    rates: Callable[[], dict[Problem, PassRate]],
    record: Path,
    measured_for: Mapping[str, object],
    stages: Sequence[Stage],
) -> Selected:
    """The task with the problems whose rates are kept, and a record of all rates: a line of JSON that says what they
    were measured for, then one for each problem.

    Args:
        task: where they are from.
        rates: estimates them; not called where there is a record of the same, so that a run that goes on has the same
            problems.
        record: a file, made if missing.
        measured_for: all that the rates depend on, as dataclasses, dicts and numbers.
        stages: as `Selected` has them.
    """
    wanted = plain(measured_for)
    if record.exists():
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        there = lines[0].get("measured_for", {}) if lines else {}
        if there == wanted:
            return Selected(task, [Problem(**line["problem"]) for line in lines[1:] if line["kept"]], stages)
        differing = ", ".join(sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key)))
        log.warning("%s was measured for another %s: it is measured again", record, differing)
    found = rates()
    if processes.writes():
        lines = [{**rate._asdict(), "kept": rate.kept, "problem": vars(problem)} for problem, rate in found.items()]
        lines = [{"measured_for": wanted}, *lines]
        write_atomically(record, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return Selected(task, [problem for problem, rate in found.items() if rate.kept], stages)
