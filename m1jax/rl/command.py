"""`m1jax train rl`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from m1jax import processes
from m1jax.chat import Tokenizer
from m1jax.errors import UserError, require_positive, require_seed
from m1jax.model import MiniMaxM1
from m1jax.rl import curriculum, pass_rate
from m1jax.rl.dry_run import described
from m1jax.rl.plugins import load_environment
from m1jax.rl.recipe import RLRecipe
from m1jax.rl.report import write_report
from m1jax.rl.rewards import RuleJudge, get_judge
from m1jax.rl.rollout import Prompts
from m1jax.rl.stream import split
from m1jax.rl.tasks import Problem, ProblemFile, Task, UserProblems, get_task, read_problems
from m1jax.rl.trainer import PHASE, Trainer
from m1jax.train import placement
from m1jax.train.data import load_tokenizer, weighted
from m1jax.train.estimate import warn_if_slow
from m1jax.train.metrics import draw_curves
from m1jax.train.run import Branch, Run, run_directory
from m1jax.train.sft import export
from m1jax.weights.directory import read_config

CURVES = [
    ("reward", PHASE, ["reward", "heldout_reward"]),
    ("response length (tokens)", PHASE, ["length", "length_p99"]),
    ("entropy (nats per token)", PHASE, ["entropy"]),
    ("importance weight: maximum before clipping", PHASE, ["ratio_max"]),
    ("share of clipped tokens", PHASE, ["clipped"]),
    ("gradient norm", PHASE, ["grad_norm"]),
]
BASIC = {
    *("model", "data", "task", "reward", "environment", "name", "runs", "seed", "mesh", "recipe_file", "dry_run"),
    *("iterations", "learning_rate", "prompts", "samples", "max_prompt_tokens", "max_new_tokens", "chat"),
    *("format_reward", "overlong_buffer", "convention", "max_weight", "updates", "row_length"),
}
"""what --help lists"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a model by reinforcement learning on problems whose answers can be verified.

    m1jax train rl models/my-model --data problems.jsonl --name my-run

    m1jax train rl models/my-model --task chain_sum --name my-run

    What matters most is listed by --help, everything by --help-all.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory of the model to start from: config.json, *.safetensors, tokenizer.json."""
    data: tuple[str, ...] = ()
    """Your problems, JSON lines {"prompt": "...", "answer": "..."}; one in eight is held out. Mathematical answers
    count as right when they are equal as mathematics. Records as GSM8K, DAPO-Math, IFEval and code problems have them
    are understood too, also in Parquet (docs/training.md). Several files are mixed: a.jsonl=3 b.jsonl=1 takes three
    problems of the first for one of the second."""
    task: str | None = None
    """Or a task: sums, board, a family of reasoning-gym (extra `tasks`), logic for many of them, or your own,
    FILE.py:name (docs/environments.md). Several are mixed: sums=3+board takes three problems of the first for one of
    the second."""
    reward: str | None = None
    """Your own reward, FILE.py:function, instead of right and wrong (rules): a function of any of prompt, response,
    answer (turns, finished), by these names, that returns a number. Several are added: rules+FILE.py:function=0.2."""
    environment: str | None = None
    """What the model acts in, where it speaks more than once and the task has no such thing itself: FILE.py:name."""
    name: str = "rl"
    """The run's results go to RUNS/NAME; a run that was interrupted goes on where it was."""
    runs: Path = Path("runs")
    branch: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN[:STEP]")] = None
    """Begin a new run at another one's newest checkpoint, or at that of a step; any option of training may differ."""
    seed: int = 0
    """Order of the problems, and sampling."""
    pass_rate_problems: int = 0
    """Let the model attempt so many problems first, --samples times each, and train on those alone that it solves at
    times: more often than never, less often than nine times in ten. 0: no such choice."""
    mesh: str = ""
    """How the devices share the work, for example fsdp=4,tensor=2 (docs/multihost.md); one device without it."""
    wandb: str | None = None
    """A project of Weights & Biases to send the figures to as well (extra `wandb`)."""
    recipe_file: Annotated[str | None, tyro.conf.arg(name="recipe", metavar="FILE")] = None
    """A TOML file of options (docs/training.md), or one that comes along: m1-report, scalerl. What is given here as
    well wins."""
    dry_run: bool = False
    """Say what would happen (updates, tokens, memory, time), and end."""
    profile: bool = False
    """Trace three updates into RUNS/NAME/profile, for xprof or TensorBoard."""
    recipe: tyro.conf.OmitArgPrefixes[RLRecipe] = dataclasses.field(default_factory=RLRecipe)


def main(config: Config) -> None:
    """Trains; RUNS/NAME then holds checkpoints, metrics.jsonl, tensorboard/, curves.png, report.html, samples and
    the model (export/)."""
    if bool(config.data) == (config.task is not None):
        raise UserError("train rl: give either --data FILE.jsonl or --task NAME")
    require_seed(config.seed)
    require_positive(config, "pass_rate_problems", zero=True)
    directory, recipe = run_directory(config.runs, config.name), config.recipe
    branch = None if config.branch is None else Branch.parse(config.branch)
    environment = None if config.environment is None else load_environment(config.environment)
    with placement.use_mesh(config.mesh, split(recipe.generator_mesh)[0]):
        tokenizer = load_tokenizer(config.model)
        files = weighted(config.data) if config.data else []
        task = _problems(files, tokenizer, recipe) if files else get_task(config.task or "")
        judge = None if config.reward is None else get_judge(config.reward, task, recipe.reward.format_reward)
        stages = curriculum.stages_of(task, recipe.curriculum)
        shapes = [(recipe.update.rows, recipe.update.row_length)]
        if config.dry_run:
            model_config = read_config(config.model)
            placement.check_rows(model_config, shapes)
            print("\n".join(described(model_config, recipe)))
            return
        model = placement.load_model(config.model, shapes)
        asked = recipe.generation
        tokens = asked.prompts * asked.samples * asked.longest // recipe.update.updates  # at most; generation apart
        warn_if_slow(model.config, tokens, asked.longest, recipe.planned_updates, f"prompts {asked.prompts}")
        settings = {
            "command": "train rl",
            "model_config": model.config,
            "model": config.model,
            "data": [(Path(path), weight) for path, weight in files],
            "task": config.task,
            "reward": config.reward,
            "environment": config.environment,
            "seed": config.seed,
            "pass_rate_problems": config.pass_rate_problems,
            "recipe": recipe,
        }
        run = Run(directory, settings, branch=branch, wandb=config.wandb)
        if config.pass_rate_problems:
            rated = judge or RuleJudge(task, recipe.reward.format_reward)

            def rates() -> dict[Problem, pass_rate.PassRate]:
                attempt = pass_rate.attempts(model, task, tokenizer, recipe.generation, config.seed, environment)
                return pass_rate.estimate(attempt, rated, config.pass_rate_problems)

            measured_for = {
                "model": config.model.resolve(),
                "data": [(Path(path).resolve(), weight) for path, weight in files],
                "task": config.task,
                "reward": [config.reward, recipe.reward.format_reward],
                "environment": config.environment,
                "seed": config.seed,
                "problems": config.pass_rate_problems,
                "generation": recipe.generation,
            }
            # The task's own weights are measured with: of what a later stage begins with there must be problems, too.
            chosen = pass_rate.select(task, rates, directory / "pass_rates.jsonl", measured_for, stages)
        else:
            curriculum.follow(task, stages)
            chosen = task
        trainer = Trainer(
            run,
            model,
            chosen,
            tokenizer,
            recipe,
            config.seed,
            judge=judge,
            environment=environment,
            profile=config.profile,
        )
        try:
            trained = trainer.train()
        except SystemExit:  # asked to stop, or nothing learnt: how far it came, and why, is to be seen all the same
            report(run)
            raise
        finish(run, trained, tokenizer)


def _problems(files: list[tuple[str, float]], tokenizer: Tokenizer, recipe: RLRecipe) -> Task:
    prompts = Prompts(tokenizer, recipe.generation.chat)

    def encode(prompt: str) -> list[int]:
        return prompts.first([{"role": "user", "content": prompt}])

    longest = recipe.generation.max_prompt_tokens
    return UserProblems([ProblemFile(path, read_problems(path, encode, longest), weight) for path, weight in files])


def finish(run: Run, model: MiniMaxM1, tokenizer: Tokenizer) -> None:
    """Draws the curves, writes the report and exports the model."""
    if processes.writes():
        draw_curves(run.log.records, CURVES, run.directory / "curves.png")
    report(run)
    export(run, model, tokenizer)


def report(run: Run) -> None:
    """Writes the run's report.html."""
    if processes.writes():
        write_report(run.directory, run.log.of(PHASE))
