"""Reinforcement learning with CISPO (MiniMax-M1 report, section 3)."""

import dataclasses
from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from m1jax import processes
from m1jax.chat import Tokenizer
from m1jax.config import ModelConfig
from m1jax.errors import UNTRAINED
from m1jax.flops import forward_flops
from m1jax.model import MiniMaxM1, Remat
from m1jax.rl.environment import MakeEnvironment
from m1jax.rl.evaluation import summary, write_samples
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.losses import Objective, policy_loss
from m1jax.rl.prepare import prepare, useful
from m1jax.rl.recipe import RLRecipe
from m1jax.rl.rewards import Judge, RuleJudge, score
from m1jax.rl.rollout import Rollout
from m1jax.rl.tasks import Split, Task
from m1jax.rl.types import Group, RLBatch, Scored, Updates
from m1jax.train import placement, statistics
from m1jax.train.optimizer import updates_made
from m1jax.train.run import Run
from m1jax.train.session import Figures, Json, Session
from m1jax.train.statistics import Mean, Stats
from m1jax.train.step import LossFn, Params, TrainState, make_train_step

PHASE = "rl"
# Statistics also logged for each update of a generation batch: they show how far off-policy the late ones are.
BY_UPDATE = ("ratio_max", "clipped", "kl_k3")


def rl_loss(
    graph: nnx.GraphDef[MiniMaxM1], objective: Objective, *, temperature: float = 1.0, remat: Remat = "auto"
) -> LossFn[RLBatch]:
    """An objective of `losses` as `loss_fn(params, micro-batch)`; adds the policy's entropy, nats per token, to the
    statistics."""

    def loss_fn(params: Params, batch: RLBatch) -> tuple[Float[Array, ""], Stats]:
        model = nnx.merge(graph, params)
        out = model.forward(batch.tokens, segment_ids=batch.segment_ids, remat=remat)
        logp, entropy = model.log_probs(out.hidden, batch.targets, temperature=temperature)
        taken = (batch.old_logp, batch.advantage, batch.mask, batch.weight)
        loss, stats = policy_loss(objective, logp, *taken, segment_ids=batch.segment_ids)
        return loss, {**stats, "entropy": Mean.of(entropy, batch.weight)}

    return loss_fn


@dataclasses.dataclass
class Position:
    """Where the training is. With the state and the current generation batch, this is all that a resumed run needs:
    every random number comes from the seed and these counters."""

    iteration: int = 0
    """generation batches finished"""
    update: int = 0
    """updates tried with the current generation batch"""
    asked: int = 0
    """problems asked so far"""
    generated: dict[str, float] = dataclasses.field(default_factory=dict)
    """figures of the current generation batch"""
    stats: list[Stats | None] = dataclasses.field(default_factory=list)
    """of its updates so far; None for one that was left out"""

    def to_json(self) -> Json:
        stats = [None if s is None else statistics.to_json(s) for s in self.stats]
        return {**vars(self), "stats": stats}

    @classmethod
    def from_json(cls, stored: Json) -> "Position":
        stats = [None if s is None else statistics.from_json(s) for s in stored["stats"]]
        return cls(**{**stored, "stats": stats})


class Trainer:
    """Trains a policy by repeating five phases:

    1. *Generate*: P problems, G attempts at each, with the log-probabilities under the policy that made them.
    2. *Reward*: a judge says what each attempt is worth; overlong ones lose some. Groups whose raw rewards are all
       equal teach nothing: for up to `rounds` rounds, others are asked (dynamic sampling).
    3. *Prepare*: rewards become advantages within each group, and what teaches something is dealt out to the updates
       and packed into rows.
    4. *Update*: `updates` steps of AdamW on the loss (CISPO, or another of `conventions`), each on its own part of the
       batch. From the second on the policy is no longer the one that generated: the loss's importance weight corrects
       for that.
    5. *Log*, and evaluate on held-out problems now and then.

    A checkpoint may be made after any update; `train` goes on from the newest one, in the middle of a generation batch
    too, and ends with the parameters of an undisturbed run, to the bit.

    Args:
        run: where checkpoints and metrics go.
        model: the policy to start from.
        task: where problems come from.
        tokenizer: the model's.
        recipe: how.
        seed: of problems and sampling.
        judge: what rewards; None: the task's own rules.
        environment: what the policy acts in, made anew for each attempt; None: what the task says.
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
        judge: Judge | None = None,
        environment: MakeEnvironment | None = None,
        profile: bool = False,
    ):
        self._run, self._recipe, self._seed, self._config = run, recipe, seed, model.config
        self._graph, params = nnx.split(model)
        self._generator = EngineGenerator(
            self._graph,
            prompts=recipe.generation.prompts,
            samples=recipe.generation.samples,
            prompt_tokens=recipe.generation.max_prompt_tokens,
            new_tokens=recipe.generation.max_new_tokens,
        )
        self._rollout = Rollout(task, tokenizer, self._generator, recipe.generation, environment)
        self._judge = judge or RuleJudge(task, recipe.reward.format_reward)
        optimizer = recipe.optimizer.build(recipe.planned_updates)
        loss_fn = rl_loss(
            self._graph,
            recipe.loss.chosen.objective,
            temperature=recipe.generation.temperature,
            remat=recipe.update.remat,
        )
        self._step = make_train_step(loss_fn, optimizer)
        self._session = Session(
            run,
            PHASE,
            config=model.config,
            state=placement.place_state(params, optimizer),
            schedule=recipe.optimizer.schedule(recipe.planned_updates),
            recipe=recipe,
            total=recipe.iterations,
            profile=profile,
        )
        self._position = Position()

    @property
    def state(self) -> TrainState:
        """Parameters and optimizer state, as they are now."""
        return self._session.state

    def train(self) -> MiniMaxM1:
        """Runs all phases to the end and returns the trained policy.

        Raises:
            SystemExit: asked to stop (SIGTERM), with status `STOPPED`, everything is saved; or, with `UNTRAINED`, no
                update was made in the whole run.
        """
        with self._session as session:
            updates = self._restored()
            while self._position.iteration < self._recipe.iterations:
                if updates is None:
                    scored = self._experience()
                    updates = prepare(scored, self._recipe)
                for batch in updates.remaining(self._position.update):
                    self._update(batch, updates)
                self._log()
                updates = None
            if not updates_made(session.state.opt_state):
                session.message(
                    f"not one update was made in {self._recipe.iterations} generation batches: the model is what it "
                    "was, and is not exported"
                )
                raise SystemExit(UNTRAINED)
        return nnx.merge(self._graph, session.state.params)

    def _experience(self) -> list[Scored]:
        """Phases 1 and 2, in rounds."""
        recipe, position = self._recipe.generation, self._position
        scored: list[Scored] = []
        for _ in range(recipe.rounds):
            groups = self._generate("train", position.asked)
            position.asked += recipe.prompts
            scored += self._reward(groups)
            if len(useful(scored)) >= recipe.prompts:
                break
        kept = len(useful(scored))
        position.generated = {**summary(scored), "asked": len(scored), "kept": kept}
        if not kept:
            self._session.message(f"generation batch {position.iteration + 1}: {_nothing_learnt(scored)}")
        return scored

    def _generate(self, split: Split, first: int) -> list[Group]:
        self._generator.load(self.state.params, self._position.iteration)
        groups = self._rollout(split, self._seed, first)
        self._generator.rest()
        if split == "train":
            self._session.worked(*_work(self._config, groups))
        return groups

    def _reward(self, groups: Sequence[Group]) -> list[Scored]:
        limit = self._recipe.generation.max_new_tokens
        return score(groups, self._judge, self._recipe.reward, max_tokens=limit)

    def _update(self, batch: RLBatch, updates: Updates) -> None:
        """One update of phase 4, and a checkpoint if one is due."""
        recipe, position = self._recipe.update, self._position
        share, shares = placement.share_of_rows()
        mine = slice(share * recipe.rows // shares, (share + 1) * recipe.rows // shares)
        placed = placement.place_batch(batch.map(lambda x: x[:, mine]))
        # A short batch's updates stand for all that were planned of it, so that the schedule ends with the run.
        begun = position.iteration * recipe.updates
        planned = begun + (position.update + 1) * recipe.updates / len(updates) - 1
        position.stats.append(self._session.update(self._step, placed, planned=planned))
        position.update += 1
        if position.update < len(updates):  # else `_log` saves
            self._session.checkpoint(begun + position.update, position.to_json(), updates.batch.fields())

    def _log(self) -> None:
        """Phase 5."""
        recipe, position, session = self._recipe, self._position, self._session
        made = [stats for stats in position.stats if stats is not None]
        figures = {**position.generated, **_combined(position.stats), "updates": len(made)}
        self._position = position = Position(iteration=position.iteration + 1, asked=position.asked)
        last = position.iteration == recipe.iterations
        if last or position.iteration % recipe.evaluation.evaluate_every == 0:
            figures |= self._evaluate("after" if last else None)
        figures |= session.record(position.iteration, figures)
        shown = ("reward", "length", "entropy", "ratio_max", "clipped", "heldout_reward", "tokens_per_second")
        session.show(position.iteration, {name.replace("_per_second", "/s"): figures.get(name) for name in shown})
        session.checkpoint(position.iteration * recipe.update.updates, position.to_json(), last=last)

    def _evaluate(self, samples: str | None) -> dict[str, float]:
        """Figures of held-out problems; `samples` names a file to show some responses in."""
        rounds, prompts = self._recipe.evaluation.evaluate_rounds, self._recipe.generation.prompts
        scored = [group for i in range(rounds) for group in self._reward(self._generate("heldout", i * prompts))]
        if samples is not None and processes.writes():
            write_samples(scored, self._run.directory / f"samples_{samples}.md")
        return {f"heldout_{name}": value for name, value in summary(scored).items()}

    def _restored(self) -> Updates | None:
        """Goes to where the training was left; the generation batch that it was left in, if there is one."""
        place, recipe = self._session.place, self._recipe
        if place is None:
            self._session.message(f"loss: {recipe.loss.chosen}")
            heldout = self._evaluate("before")
            self._session.record(0, heldout)
            self._session.message(f"held-out reward before: {heldout['heldout_reward']:.3f}")
            return None
        self._position = Position.from_json(place.state)
        if not place.arrays:
            return None
        return Updates(RLBatch.of(**place.arrays)).cut(recipe.update.rows, recipe.micro_batches)


def _work(config: ModelConfig, groups: Sequence[Group]) -> tuple[int, int]:
    """Generated tokens, and the operations they took; the responses to a problem share its prompt."""
    tokens = flops = 0
    for group in groups:
        start = len(group.episodes[0].prompt)
        flops += forward_flops(config, start)
        flops += sum(forward_flops(config, len(episode.tokens), start=start) for episode in group.episodes)
        tokens += sum(episode.length for episode in group.episodes)
    return tokens, flops


def _combined(updates: Sequence[Stats | None]) -> Figures:
    """One record of the statistics of a generation batch's updates; those left out only count."""
    made = [stats for stats in updates if stats is not None]
    record: dict[str, float | Sequence[float | None] | None] = {}
    if len(made) < len(updates):
        record["skipped"] = len(updates) - len(made)
    if not made:
        return record
    figures = statistics.values(statistics.merge(made))
    for name in BY_UPDATE:
        record[f"{name}_by_update"] = [None if stats is None else stats[name].value() for stats in updates]
    record |= {name: value for name, value in figures.items() if name != "gap_max"}
    if updates[0] is not None:
        # At the first update the policy is still the sampler's: whatever differs is numerics.
        record["sampler_gap"] = updates[0]["gap_max"].value()
    return record


def _nothing_learnt(scored: Sequence[Scored]) -> str:
    """What to say of a generation batch whose groups all agree, and what to try."""
    right = sum(bool(group.correct.all()) for group in scored)
    wrong = sum(not group.correct.any() for group in scored)
    if right > wrong:
        advice = "harder problems, or a higher --temperature"
    else:
        advice = "easier problems, a model that was fine-tuned on such answers, more --samples or --max-new-tokens"
    return (
        f"no update: the responses to each of {len(scored)} problems were all rewarded alike ({right} problems all "
        f"right, {wrong} all wrong), which leaves nothing to learn from; try {advice}"
    )
