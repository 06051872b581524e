"""Reinforcement learning with CISPO on verifiable tasks (MiniMax-M1 report, section 3): `m1jax train rl`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from m1jax.chat import Tokenizer
from m1jax.checkpoint import Checkpoints
from m1jax.config import ModelConfig
from m1jax.disk import write_atomically
from m1jax.errors import STOPPED, UserError, require_positive, require_seed
from m1jax.flops import forward_flops, training_flops
from m1jax.model import MiniMaxM1
from m1jax.rl.advantages import group_advantages, informative
from m1jax.rl.losses import cispo_loss
from m1jax.rl.rollout import Group, Sampler, build_updates
from m1jax.rl.tasks import Task, UserProblems, get_task
from m1jax.train import placement
from m1jax.train.data import load_tokenizer, read_problems
from m1jax.train.guards import NonFiniteGuard, OnNonFinite, StopRequests
from m1jax.train.meter import Meter, Tracer
from m1jax.train.metrics import draw_curves
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.progress import Reporter
from m1jax.train.run import Run
from m1jax.train.sft import export
from m1jax.train.step import LossFn, make_train_step

PHASE = "rl"
# Statistics also logged for each update of a generation batch: they show how far off-policy the late ones are.
BY_UPDATE = ("ratio_max", "clipped", "kl_k3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLRecipe:
    """How to train; the defaults are the report's where it gives a number."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6))
    iterations: int = 100
    """generation batches"""
    prompts: int = 64
    """P, problems in a generation batch"""
    samples: int = 16
    """G, responses to each problem"""
    updates: int = 16
    """off-policy updates per generation batch"""
    max_weight: float = 5.0
    """upper bound of the importance weight pi / pi_old, the weight itself and not an offset from 1; there is no lower
    bound"""
    rounds: int = 3
    """dynamic sampling: problems whose responses are all rewarded alike teach nothing; they are dropped, and others are
    asked in up to so many rounds of P (1: dropped without refill)"""
    format_reward: float = 0.1
    """for a wrong answer in the right form `<think>...</think>answer`; a right one gets 1"""
    overlong_buffer: int = 0
    """soft overlong penalty: width in tokens of the ramp below max_new_tokens (0: none)"""
    temperature: float = 1.0
    max_prompt_tokens: int = 256
    max_new_tokens: int = 1024
    row_length: int = 1280
    """tokens per row of an update's micro-batches; several responses share a row"""
    rows: int = 8
    """rows per micro-batch; the result does not depend on it, memory does"""
    remat: bool = False
    """recompute layers in the backward pass: less memory, more time"""
    evaluate_every: int = 10
    """generation batches between evaluations on held-out problems"""
    evaluate_rounds: int = 4
    """an evaluation asks so many times P held-out problems, G times each"""
    checkpoint_every: int = 40
    """updates between checkpoints; they may fall into the middle of a generation batch"""
    on_nonfinite: OnNonFinite = "stop"
    """what to do when a loss or gradient is not finite"""

    def __post_init__(self) -> None:
        counts = (
            "iterations prompts updates rounds max_prompt_tokens max_new_tokens rows evaluate_every evaluate_rounds"
        )
        require_positive(self, *counts.split(), "checkpoint_every", "max_weight", "temperature")
        require_positive(self, "format_reward", "overlong_buffer", zero=True)
        longest = self.max_prompt_tokens + self.max_new_tokens
        if self.row_length < longest:
            raise UserError(
                f"rl: row_length = {self.row_length} must hold a prompt and its response: max_prompt_tokens + "
                f"max_new_tokens = {longest}"
            )
        if self.samples < 2:
            raise UserError(f"rl: samples = {self.samples}; an advantage compares at least 2 responses to a problem")

    @property
    def micro_batches(self) -> int:
        """Room for an update whose responses all have the greatest length."""
        responses = -(-self.prompts // self.updates) * self.samples
        per_row = self.row_length // (self.max_prompt_tokens + self.max_new_tokens)
        return -(-responses // (per_row * self.rows))


@dataclasses.dataclass
class Position:
    """Where the training is. With parameters, optimizer state and buffer, this is all that a resumed run needs: every
    random number comes from the seed and these counters."""

    iteration: int = 0
    """generation batches finished"""
    update: int = 0
    """updates made with the current generation batch"""
    asked: int = 0
    """problems asked so far"""
    seconds: float = 0.0
    """spent in training, over all processes of the run"""
    tokens: int = 0
    """generated and trained on"""
    generated: dict[str, float] = dataclasses.field(default_factory=dict)
    """statistics of the current generation batch"""
    stats: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """statistics of its updates so far"""


def rl_loss(graph: Any, *, max_weight: float, temperature: float = 1.0, remat: bool = False) -> LossFn:
    """CISPO over a micro-batch of `rollout.build_updates`, as `loss_fn(params, micro-batch)`; adds the policy's entropy
    (nats per token) to the statistics."""

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        model: MiniMaxM1 = nnx.merge(graph, params)
        states = model.forward(batch["tokens"], segment_ids=batch["segment_ids"], remat="layers" if remat else "none")
        logp, entropy = model.log_probs(states.hidden, batch["targets"], temperature=temperature)
        weights = batch["weight"]
        loss, stats = cispo_loss(
            logp, batch["old_logp"], batch["advantage"], weights > 0, max_weight=max_weight, weights=weights
        )
        return loss, {**stats, "entropy": jnp.sum(weights * entropy)}

    return loss_fn


class Trainer:
    """Trains a policy by repeating five phases:

    1. *Generate*: P problems, G responses each, with the log-probabilities under the policy that wrote them.
    2. *Reward*: rules judge form and answer; overlong responses lose some.
    3. *Advantage*: rewards are normalised within each group; groups without a difference are dropped and, for up to
       `rounds` rounds, replaced (dynamic sampling). What remains is dealt out to the updates and packed into rows.
    4. *Update*: `updates` steps of AdamW on the CISPO loss, each on its own part of the batch. From the second on the
       policy is no longer the one that generated: the loss's importance weight corrects for that.
    5. *Log*, and evaluate on held-out problems now and then.

    A checkpoint may be made after any update; `train` goes on from the newest one, in the middle of a generation batch
    too, and ends with the parameters of an undisturbed run, to the bit.

    Args:
        run: where checkpoints and metrics go.
        model: the policy to start from.
        task: problems and their judge.
        tokenizer: the model's.
        recipe: how.
        seed: of problems and sampling.
        profile: trace some updates into the run's `profile/`.
    """

    def __init__(
        self,
        run: Run,
        model: MiniMaxM1,
        task: Task,
        tokenizer: Tokenizer,
        recipe: RLRecipe,
        seed: int,
        *,
        profile: bool = False,
    ):
        self.run, self.recipe, self.seed = run, recipe, seed
        self.config = model.config
        self.graph, params = nnx.split(model)
        optimizer = recipe.optimizer.build(recipe.iterations * recipe.updates)
        self.state = placement.place_state(params, optimizer)
        self.position = Position()
        self.buffer: dict[str, np.ndarray] | None = None
        loss_fn = rl_loss(self.graph, max_weight=recipe.max_weight, temperature=recipe.temperature, remat=recipe.remat)
        self._step = make_train_step(loss_fn, optimizer)
        self._guard = NonFiniteGuard(run.directory, recipe.on_nonfinite)
        self._sampler = Sampler(
            task=task,
            tokenizer=tokenizer,
            graph=self.graph,
            prompts=recipe.prompts,
            samples=recipe.samples,
            max_prompt_tokens=recipe.max_prompt_tokens,
            max_new_tokens=recipe.max_new_tokens,
            temperature=recipe.temperature,
            format_reward=recipe.format_reward,
            overlong_buffer=recipe.overlong_buffer,
        )
        self._tracer = Tracer(run.directory / "profile" if profile else None)

    def train(self) -> MiniMaxM1:
        """Runs all phases to the end and returns the trained policy.

        Raises:
            SystemExit: asked to stop (SIGTERM), with status `STOPPED`; everything is saved.
        """
        recipe, position = self.recipe, self.position
        with (
            Checkpoints(self.run.checkpoints_of(PHASE), config=self.config, keep=2) as self._checkpoints,
            StopRequests() as self._stop,
            self._tracer,
        ):
            fresh = not self._restore()
            self._meter = Meter(self.position.seconds, self.position.tokens)
            with Reporter("RL", recipe.iterations, self.position.iteration) as reporter:
                if fresh:
                    heldout = self._evaluate("before")
                    self.run.log.append(PHASE, 0, heldout)
                    reporter.message(f"held-out reward before: {heldout['heldout_reward']:.3f}")
                while (position := self.position).iteration < recipe.iterations:
                    if self.buffer is None:
                        self._generate()
                    while self.buffer is not None and position.update < len(self.buffer["tokens"]):
                        self._update(reporter)
                    self._finish(reporter)
        return nnx.merge(self.graph, self.state.params)

    def _generate(self) -> None:
        """Phases 1 to 3."""
        recipe, position = self.recipe, self.position
        asked: list[Group] = []
        kept: list[Group] = []
        for _ in range(recipe.rounds):
            groups = self._sampler.sample(self.state.params, "train", self.seed, position.asked)
            position.asked += recipe.prompts
            asked += groups
            kept += [g for g, useful in zip(groups, informative(np.stack([g.rewards for g in groups]))) if useful]
            if len(kept) >= recipe.prompts:
                break
        kept = kept[: recipe.prompts]
        position.generated = {**_summary(asked), "asked": len(asked), "kept": len(kept)}
        self._meter.add(*_work(self.config, asked))
        if not kept:
            return
        self.buffer = build_updates(
            kept,
            group_advantages(np.stack([g.rewards for g in kept])),
            updates=recipe.updates,
            rows=recipe.rows,
            row_length=recipe.row_length,
            micro_batches=recipe.micro_batches,
        )

    def _update(self, reporter: Reporter) -> None:
        """One update of phase 4, and a checkpoint if one is due."""
        assert self.buffer is not None
        recipe, position = self.recipe, self.position
        share, shares = placement.share_of_rows()
        mine = slice(share * recipe.rows // shares, (share + 1) * recipe.rows // shares)
        batch = placement.place_batch({name: x[position.update][:, mine] for name, x in self.buffer.items()})
        self._tracer.next()
        self.state, stats = self._step(self.state, batch)
        stats = {name: float(value) for name, value in jax.device_get(stats).items()}
        self._guard.check(int(self.state.step), stats.pop("skipped"), batch, stats)
        tokens = stats.pop("tokens")
        self._meter.add(tokens, training_flops(self.config, tokens, stats.pop("pairs")))
        position.update += 1
        position.stats.append(stats)
        if position.update < len(self.buffer["tokens"]):  # else `_finish` saves
            number = position.iteration * recipe.updates + position.update
            self._save(number, due=number % recipe.checkpoint_every == 0, reporter=reporter)

    def _finish(self, reporter: Reporter) -> None:
        """Phase 5. The record is on disk before the checkpoint that lies behind it (see MetricsLog)."""
        recipe, position = self.recipe, self.position
        updates = position.update
        record: dict[str, Any] = {**position.generated, **_combined(position.stats), "updates": updates}
        position.iteration, position.update, position.stats, self.buffer = position.iteration + 1, 0, [], None
        last = position.iteration == recipe.iterations
        if last or position.iteration % recipe.evaluate_every == 0:
            record |= self._evaluate("after" if last else None)
        record |= self._meter.record()
        self.run.log.append(PHASE, position.iteration, record)
        shown = ("reward", "length", "entropy", "ratio_max", "clipped", "heldout_reward", "tokens_per_second")
        reporter.update(position.iteration, {n.replace("_per_second", "/s"): record[n] for n in shown if n in record})
        number = position.iteration * recipe.updates
        # Due if a multiple of checkpoint_every lies within the updates since the last regular place for one.
        due = last or number // recipe.checkpoint_every > (number - 1) // recipe.checkpoint_every
        self._save(number, due=due, reporter=reporter)

    def _evaluate(self, samples: str | None) -> dict[str, float]:
        """Mean reward, accuracy and length on held-out problems; `samples` names a file to show some responses in."""
        recipe = self.recipe
        groups = [
            group
            for i in range(recipe.evaluate_rounds)
            for group in self._sampler.sample(self.state.params, "heldout", self.seed, i * recipe.prompts)
        ]
        if samples is not None and placement.writes():
            _write_samples(groups[:8], self.run.directory / f"samples_{samples}.md")
        return {f"heldout_{name}": value for name, value in _summary(groups).items()}

    def _save(self, number: int, *, due: bool, reporter: Reporter) -> None:
        """A checkpoint where one is due or the training is asked to stop, which it then does."""
        stopping = self._stop.requested() and self.position.iteration < self.recipe.iterations
        if not due and not stopping:
            return
        self._meter.tick()
        self.position.seconds, self.position.tokens = self._meter.seconds, self._meter.tokens
        self._checkpoints.save(
            number,
            params=self.state.params,
            state=self.state._replace(params=()),
            arrays={} if self.buffer is None else {"buffer": self.buffer},
            meta=dataclasses.asdict(self.position),
        )
        if stopping:
            self._checkpoints.wait()
            reporter.message(f"asked to stop: update {number} is saved; the same command goes on from there")
            raise SystemExit(STOPPED)

    def _restore(self) -> bool:
        found = self._checkpoints.restore(params=self.state.params, state=self.state._replace(params=()))
        if found is not None:
            self.state = found.state._replace(params=found.params)
            self.position = Position(**found.meta)
            self.buffer = found.arrays.get("buffer")
        self.run.log.resume(PHASE, -1 if found is None else self.position.iteration)
        return found is not None


def _work(config: ModelConfig, groups: list[Group]) -> tuple[int, int]:
    """Generated tokens, and the operations they took; the responses to a problem share its prompt."""
    tokens = flops = 0
    for group in groups:
        start = len(group.prompt)
        flops += forward_flops(config, start)
        flops += sum(forward_flops(config, n, start=start) for n in group.lengths.tolist())
        tokens += int(group.lengths.sum())
    return tokens, flops


def _summary(groups: list[Group]) -> dict[str, float]:
    lengths = np.concatenate([g.lengths for g in groups])
    summary = {
        "reward": float(np.mean([g.rewards for g in groups])),
        "accuracy": float(np.mean([g.correct for g in groups])),
        "length": float(lengths.mean()),
        "length_p99": float(np.percentile(lengths, 99)),
        "unfinished": float(1 - np.mean([g.finished for g in groups])),
    }
    for family in sorted({g.problem.family for g in groups}):
        correct = [g.correct for g in groups if g.problem.family == family]
        summary[f"accuracy_{family}"] = float(np.mean(correct))
    return summary


def _combined(stats: list[dict[str, float]]) -> dict[str, Any]:
    """One record of the statistics of a generation batch's updates: the mean, of maxima the maximum."""
    if not stats:
        return {}
    record: dict[str, Any] = {}
    for name in stats[0]:
        values = [s[name] for s in stats]
        record[name] = max(values) if name.endswith("_max") else float(np.mean(values))
        if name in BY_UPDATE:
            record[f"{name}_by_update"] = values
    # At the first update the policy is still the sampler's: whatever differs is numerics.
    record["sampler_gap"] = stats[0]["kl_k3"]
    return record


def _write_samples(groups: list[Group], path: Path) -> None:
    lines = []
    for group in groups:
        lines += [f"## `{group.problem.prompt}`", f"expected: `{group.problem.answer}`", ""]
        lines += [f"- reward {r:.2f}: `{text}`" for r, text in list(zip(group.rewards, group.texts))[:4]] + [""]
    write_atomically(path, "\n".join(lines))


CURVES = [
    ("reward", PHASE, ["reward", "heldout_reward"]),
    ("response length (tokens)", PHASE, ["length", "length_p99"]),
    ("entropy (nats per token)", PHASE, ["entropy"]),
    ("importance weight: maximum before clipping", PHASE, ["ratio_max"]),
    ("share of clipped tokens", PHASE, ["clipped"]),
    ("gradient norm", PHASE, ["grad_norm"]),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a model by reinforcement learning on problems whose answers can be verified.

    m1jax train rl models/my-model --data problems.jsonl --name my-run

    m1jax train rl models/my-model --task chain_sum --name my-run
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory of the model to start from: config.json, *.safetensors, tokenizer.json."""
    data: Path | None = None
    """Your problems, JSON lines {"prompt": "...", "answer": "..."}; one in eight is held out. Mathematical answers
    count as right when they are equal as mathematics."""
    task: str | None = None
    """Or a task: sums, board, both as sums+board, or a family of reasoning-gym (extra `tasks`)."""
    name: str = "rl"
    """The run's results go to RUNS/NAME; a run that was interrupted goes on where it was."""
    runs: Path = Path("runs")
    seed: int = 0
    """Order of the problems, and sampling."""
    mesh: str = ""
    """How the devices share the work, for example fsdp=4,tensor=2 (docs/multihost.md); one device without it."""
    profile: bool = False
    """Trace three updates into RUNS/NAME/profile, for xprof or TensorBoard."""
    recipe: tyro.conf.OmitArgPrefixes[RLRecipe] = dataclasses.field(default_factory=RLRecipe)


def main(config: Config) -> None:
    """Trains; RUNS/NAME then holds checkpoints, metrics.jsonl, tensorboard/, curves.png, samples and the model
    (export/)."""
    if (config.data is None) == (config.task is None):
        raise UserError("train rl: give either --data FILE.jsonl or --task NAME")
    require_seed(config.seed)
    recipe = config.recipe
    with placement.use_mesh(config.mesh):
        tokenizer = load_tokenizer(config.model)
        if config.data is not None:
            problems = read_problems(config.data, tokenizer, recipe.max_prompt_tokens)
            task: Task = UserProblems(problems, str(config.data))
        else:
            assert config.task is not None
            task = get_task(config.task)
        model = placement.load_model(config.model, [(recipe.rows, recipe.row_length)])
        settings = {"command": "train rl", "model_config": model.config, "model": config.model, "data": config.data}
        settings |= {"task": config.task, "seed": config.seed, "recipe": recipe}
        run = Run(config.runs / config.name, settings)
        model = Trainer(run, model, task, tokenizer, recipe, config.seed, profile=config.profile).train()
        finish(run, model, tokenizer)


def finish(run: Run, model: MiniMaxM1, tokenizer: Tokenizer) -> None:
    """Draws the curves and exports the model."""
    if placement.writes():
        draw_curves(run.log.records, CURVES, run.directory / "curves.png")
    export(run, model, tokenizer)
