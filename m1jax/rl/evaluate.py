"""`m1jax eval`: measure a model on problems whose answers can be verified, as training measures its policy."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from flax import nnx

from m1jax import processes
from m1jax.chat import Tokenizer
from m1jax.disk import write_atomically, writing
from m1jax.errors import UserError, require_positive, require_seed
from m1jax.model import MiniMaxM1
from m1jax.rl.environment import SingleTurn, environment_of
from m1jax.rl.evaluation import Marks, examine, marks, summary, write_samples
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.rewards import RewardRecipe, get_judge
from m1jax.rl.rollout import Draw, GenerationRecipe, Prompts, Rollout
from m1jax.rl.tasks import AllProblems, Problem, ProblemFile, Split, Task, get_task, read_problems
from m1jax.rl.tasks.base import Same, same_of, same_text
from m1jax.rl.types import Scored
from m1jax.train.data import load_tokenizer
from m1jax.weights.directory import locate, read_config
from m1jax.weights.pretrained import from_pretrained

AT_ONCE = 64
"""problems that are asked together"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure a model on problems whose answers can be verified.

    m1jax eval models/my-model --data aime.jsonl --samples 32
    m1jax eval runs/demo --task sums+board --no-chat
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory with config.json, *.safetensors and tokenizer.json, or that of a run, whose export is taken."""
    data: tuple[str, ...] = ()
    """Files of problems, JSON lines {"prompt": "...", "answer": "..."}; all of them are asked."""
    task: str | None = None
    """Or a task, as `train rl` takes it, whose held-out problems are asked."""
    reward: str | None = None
    """Your own reward, FILE.py:function; one or more counts as right."""
    problems: int = 256
    """Of a task: how many."""
    samples: int = 8
    """Attempts at each problem: k."""
    temperature: float = 1.0
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability (both as the report evaluates)."""
    max_prompt_tokens: int = 256
    max_new_tokens: int = 1024
    chat: bool = True
    """Put problems into the model's chat format."""
    seed: int = 0
    """Of the problems of a task, and of sampling."""
    output: Path | None = None
    """Write everything that was measured to this file too, as JSON, and some answers beside it (.md)."""

    def __post_init__(self) -> None:
        require_positive(self, "problems", "samples", "temperature", "top_p", "max_prompt_tokens", "max_new_tokens")
        if self.top_p > 1:
            raise UserError(f"top_p = {self.top_p} must not exceed 1")


class Exam:
    """A task with certain problems, in their order; asked again from the beginning behind the last."""

    def __init__(self, task: Task, problems: Sequence[Problem]):
        self.name, self._task, self._problems = task.name, task, problems
        self.environment = environment_of(task)

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        return self._problems[index % len(self._problems)]

    def correct(self, problem: Problem, answer: str) -> bool:
        return self._task.correct(problem, answer)


def main(config: Config) -> None:
    """Prints what was measured.

    Raises:
        UserError: no model, no problems, a prompt that is too long, or an output that cannot be written; before
            anything is measured.
    """
    if bool(config.data) == (config.task is not None):
        raise UserError("eval: give either --data FILE.jsonl or --task NAME")
    require_seed(config.seed)
    if config.output is not None:
        _check_output(config.output)
    directory = locate(config.model)
    tokenizer = load_tokenizer(directory)
    prompts = Prompts(tokenizer, config.chat)
    task, problems = _problems(config, prompts)
    _check_lengths(config, read_config(directory).max_position_embeddings, task, problems, prompts)
    scored = evaluate(from_pretrained(directory), tokenizer, task, problems, config)
    if not processes.writes():
        return
    same = same_of(task)
    print("\n".join(table(scored, same)))
    if config.output is not None:
        write_atomically(config.output, json.dumps(measured(scored, same), indent=1) + "\n")
        write_samples(scored, config.output.with_suffix(".md"))


def evaluate(
    model: MiniMaxM1, tokenizer: Tokenizer, task: Task, problems: Sequence[Problem], config: Config
) -> list[Scored]:
    """Attempts at the problems, judged; in their order."""
    at_once = min(len(problems), AT_ONCE)
    recipe = GenerationRecipe(
        prompts=at_once,
        samples=config.samples,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        chat=config.chat,
    )
    graph, params = nnx.split(model)
    generator = EngineGenerator(
        graph,
        prompts=at_once,
        samples=config.samples,
        prompt_tokens=config.max_prompt_tokens,
        new_tokens=config.max_new_tokens,
    )
    generator.load(params, 0)
    judge = get_judge(config.reward or "rules", task, 0.0)
    scored = examine(
        Rollout(Exam(task, problems), tokenizer, generator, recipe),
        judge,
        RewardRecipe(format_reward=0.0),
        seed=config.seed,
        starts=range(0, len(problems), at_once),
        draw=Draw(config.temperature, config.top_p),
        max_tokens=config.max_new_tokens,
    )
    return scored[: len(problems)]  # the last round is filled up


def measured(scored: Sequence[Scored], same: Same = same_text) -> dict[str, Any]:
    """Everything, as JSON can hold it: `all`, and by family; None where nothing could be judged."""

    def of(part: Sequence[Scored]) -> dict[str, Any] | None:
        return None if not _judged(part) else {**dataclasses.asdict(marks(part, same)), **summary(part)}

    return {"all": of(scored)} | {family: of(part) for family, part in by_family(scored).items()}


def by_family(scored: Sequence[Scored]) -> Mapping[str, list[Scored]]:
    """Groups of each family, where there are several."""
    families = sorted({group.group.problem.family for group in scored})
    if len(families) < 2:
        return {}
    return {family: [group for group in scored if group.group.problem.family == family] for family in families}


def table(scored: Sequence[Scored], same: Same = same_text) -> list[str]:
    """Lines for a person."""
    lines = []
    for name, part in ({"all": scored} | dict(by_family(scored))).items():
        if not _judged(part):
            lines.append(f"{name}: nothing measured: no response to its {len(part)} problems could be judged")
            continue
        found, figures = marks(part, same), summary(part)
        lines += [
            f"{name}: {found.problems} problems, {found.k} attempts at each (intervals: 95 % over problems)",
            f"  avg@{found.k} {found.average}   majority {found.majority}",
            f"  {_passed(found)}",
            f"  length {figures['length']:.0f} tokens on average, median {figures['length_p50']:.0f}, "
            f"99 % below {figures['length_p99']:.0f}; {figures['finish_length']:.1%} cut at the limit, "
            f"{figures['finish_repetition']:.1%} ended for repetition; right form {figures['format']:.1%}",
        ]
    return lines


def _passed(found: Marks) -> str:
    return "   ".join(f"pass@{n} {interval}" for n, interval in found.passed.items())


def _judged(scored: Sequence[Scored]) -> bool:
    """Whether there is anything to measure."""
    return any(len(group.correct) for group in scored)


def _check_output(path: Path) -> None:
    """Makes the folder of a file that is to be written."""
    if path.is_dir():
        raise UserError(f"--output {path} is a directory; give a file, for example {path / 'marks.json'}")
    if path.suffix.lower() == ".md":
        raise UserError(f"--output {path}: figures are JSON, and .md is for the samples beside them; give a .json file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: nothing may be written to {path.parent}; choose another place")


def _check_lengths(config: Config, positions: int, task: Task, problems: Sequence[Problem], prompts: Prompts) -> None:
    """Whether the model has positions for a prompt and its response; an environment's prompts are known later."""
    longest = 1
    if environment_of(task) is SingleTurn:
        texts = [[{"role": "user", "content": problem.prompt}] for problem in problems]
        longest = max(len(prompts.first(messages)) for messages in texts)
    if longest + config.max_new_tokens > positions:
        raise UserError(
            f"eval: a prompt of {longest} tokens and max_new_tokens = {config.max_new_tokens} exceed the model's "
            f"{positions} positions; lower max_new_tokens"
        )


def _problems(config: Config, prompts: Prompts) -> tuple[Task, list[Problem]]:
    if config.task is not None:
        task = get_task(config.task)
        found = (task.problem("heldout", config.seed, index) for index in range(config.problems))
        return task, list(dict.fromkeys(found))  # small families repeat themselves

    def encode(prompt: str) -> list[int]:
        return prompts.first([{"role": "user", "content": prompt}])

    files = [ProblemFile(path, read_problems(path, encode, config.max_prompt_tokens)) for path in config.data]
    task = AllProblems(files)
    return task, task.problems
