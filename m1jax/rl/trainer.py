"""Reinforcement learning with CISPO (MiniMax-M1 report, section 3)."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m1jax import processes
from m1jax.chat import Tokenizer
from m1jax.errors import UNTRAINED, UserError
from m1jax.model import MiniMaxM1, Remat
from m1jax.rl.alarms import alarms
from m1jax.rl.corrections import Correction
from m1jax.rl.diagnostics import nothing_learnt, of_updates
from m1jax.rl.environment import MakeEnvironment
from m1jax.rl.evaluation import marks, summary, write_samples
from m1jax.rl.experience import Experience
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.losses import Objective, kl_penalty, policy_loss, sg
from m1jax.rl.policies import Policies, hidden_of
from m1jax.rl.prepare import prepare, trained_on
from m1jax.rl.recipe import LossRecipe, RLRecipe
from m1jax.rl.rewards import Judge, RuleJudge
from m1jax.rl.rollout import Rollout
from m1jax.rl.stream import Stream, split
from m1jax.rl.tasks.base import Task, same_of
from m1jax.rl.types import RLBatch, Scored, Updates
from m1jax.train import placement, statistics
from m1jax.train.optimizer import OptimizerConfig, updates_made
from m1jax.train.run import Run
from m1jax.train.session import Arrays, Json, Session
from m1jax.train.statistics import Correlation, Max, Mean, Stats
from m1jax.train.step import LossFn, Params, TrainState, TrainStep, make_train_step

PHASE = "rl"


def rl_loss(
    graph: nnx.GraphDef[MiniMaxM1],
    objective: Objective,
    *,
    temperature: float = 1.0,
    remat: Remat = "auto",
    correction: Correction | None = None,
    kl_coefficient: float = 0.0,
) -> LossFn[RLBatch]:
    """An objective of `losses` as `loss_fn(params, micro-batch)`, with the divergence from the reference where it has a
    coefficient. A batch that has routes is sent along them.

    Adds to the statistics: the policy's `entropy`, nats per token; `pearson`, the correlation of its probabilities with
    the sampler's; `kl_reference`.
    """

    def loss_fn(params: Params, batch: RLBatch) -> tuple[Float[Array, ""], Stats]:
        model = nnx.merge(graph, params)
        logp, entropy = model.log_probs(hidden_of(model, batch, remat), batch.targets, temperature=temperature)
        sampler_logp = batch.old_logp if batch.sampler_logp is None else batch.sampler_logp
        factors = None
        if correction is not None:
            factors = correction(batch.old_logp, sampler_logp, batch.mask, batch.segment_ids)
        taken = (batch.old_logp, batch.advantage, batch.mask, batch.weight)
        loss, stats = policy_loss(objective, logp, *taken, segment_ids=batch.segment_ids, correction=factors)
        stats["entropy"] = Mean.of(entropy, batch.weight)
        stats["pearson"] = Correlation.of(jnp.exp(sg(logp)), jnp.exp(sampler_logp), batch.mask)
        stats["sampler_gap"] = Max.of(jnp.abs(sg(logp) - sampler_logp), batch.mask)
        if batch.reference_logp is not None:
            penalty = kl_penalty(logp, batch.reference_logp, batch.mask, batch.weight)
            loss += kl_coefficient * penalty
            stats["kl_reference"] = Mean(sg(penalty), jnp.sum(batch.weight))
        return loss, stats

    return loss_fn


@dataclasses.dataclass
class Position:
    """Where the training is. With the state, the current generation batch and the stream's state, this is all that a
    resumed run needs: every random number comes from the seed and counters."""

    iteration: int = 0
    """generation batches finished"""
    update: int = 0
    """updates tried with the current generation batch"""
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
       equal teach nothing, but about a batch's baseline: for up to `rounds` rounds, others are asked (dynamic
       sampling). Both phases are `Experience`'s; `Stream` runs them before the others, or beside them with a staleness.
    3. *Prepare*: rewards become advantages within each group, and what teaches something is dealt out to the updates
       and packed into rows; log-probabilities under the trainer's own old policy and the reference, where asked for.
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
        self._run, self._recipe, self._config = run, recipe, model.config
        self._graph, params = nnx.split(model)
        generation, replay = recipe.generation, recipe.update.replay_routes
        if recipe.update.share_prompts and placement.current_mesh() is not None:
            raise UserError("share_prompts: groups are not spread over a mesh; train without one, or without this")
        generator = EngineGenerator(
            self._graph,
            prompts=generation.in_work,
            samples=generation.samples,
            prompt_tokens=generation.max_prompt_tokens,
            new_tokens=generation.max_new_tokens,
            record_routes=replay,
            alone=bool(recipe.generator_mesh),
        )
        rollout = Rollout(task, tokenizer, generator, generation, environment, record_routes=replay)
        judge = judge or RuleJudge(task, recipe.reward.format_reward)
        self._same = same_of(task)
        self._stream = Stream(
            Experience(rollout, generator, judge, recipe, seed, model.config),
            staleness=recipe.staleness,
            batches=recipe.iterations,
            mesh=split(recipe.generator_mesh)[1],
        )
        optimizer = recipe.optimizer.build(recipe.planned_updates)
        self._steps = (
            self._make_step(recipe.loss, recipe.optimizer),
            self._make_step(recipe.late_loss, recipe.late_optimizer),
        )
        state = placement.place_state(params, optimizer)
        self._policies = Policies(
            self._graph,
            temperature=generation.temperature,
            recompute_old=recipe.loss.old_policy == "trainer",
            # The state's own will be donated.
            reference=jax.tree.map(jnp.copy, state.params) if recipe.loss.kl_coefficient else None,
        )
        self._session = Session(
            run,
            PHASE,
            config=model.config,
            state=state,
            schedule=recipe.optimizer.schedule(recipe.planned_updates),
            recipe=recipe,
            total=recipe.iterations,
            profile=profile,
        )
        self._position = Position()

    def _make_step(self, loss: LossRecipe, optimizer: OptimizerConfig) -> TrainStep:
        loss_fn = rl_loss(
            self._graph,
            loss.chosen.objective,
            temperature=self._recipe.generation.temperature,
            remat=self._recipe.update.remat,
            correction=loss.factors,
            kl_coefficient=loss.kl_coefficient,
        )
        return make_train_step(loss_fn, optimizer.build(self._recipe.planned_updates))

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
        with self._stream, self._session as session:
            updates = self._restored()
            while self._position.iteration < self._recipe.iterations:
                if updates is None:
                    updates = self._policies(prepare(self._experience(), self._recipe), self.state.params)
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
        """The next generation batch of the stream."""
        position, session = self._position, self._session
        begin = time.perf_counter()
        self._stream.give(self.state.params, position.iteration)
        made = self._stream.take()
        waited = time.perf_counter() - begin
        session.worked(*made.work)
        for said in made.said:
            session.message(said)
        position.generated = {
            **made.figures,
            "staleness": position.iteration - made.version,
            "waiting_seconds": waited,
        }
        planned = max(position.iteration - self._recipe.staleness, 0)
        if made.version > planned:
            session.message(
                f"generation batch {position.iteration + 1}: written by version {made.version} of the parameters "
                f"instead of {planned}, because the run had ended before it and was extended"
            )
        if not trained_on(made.scored, self._recipe):
            session.message(f"generation batch {position.iteration + 1}: {nothing_learnt(made.scored)}")
        return made.scored

    def _update(self, batch: RLBatch, updates: Updates) -> None:
        """One update of phase 4, and a checkpoint if one is due."""
        recipe, position = self._recipe, self._position
        placed = placement.place_batch(placement.own_share(batch))
        # A short batch's updates stand for all that were planned of it, so that the schedule ends with the run.
        begun = position.iteration * recipe.update.updates
        planned = begun + (position.update + 1) * recipe.update.updates / len(updates) - 1
        late = 0 < recipe.late.late_from <= position.iteration
        position.stats.append(self._session.update(self._steps[late], placed, planned=planned))
        position.update += 1
        if position.update < len(updates):  # else `_log` saves
            self._session.checkpoint(begun + position.update, lambda: self._place(updates.batch.fields()))

    def _place(self, updates: Arrays) -> tuple[Json, Arrays]:
        """What a checkpoint keeps beside the state."""
        rest, arrays = self._stream.state()
        return {"position": self._position.to_json(), "stream": rest}, {"stream": arrays, "updates": updates}

    def _log(self) -> None:
        """Phase 5."""
        recipe, position, session = self._recipe, self._position, self._session
        made = [stats for stats in position.stats if stats is not None]
        figures = {**position.generated, **of_updates(position.stats), "updates": len(made)}
        self._position = position = Position(iteration=position.iteration + 1)
        last = position.iteration == recipe.iterations
        if last or position.iteration % recipe.evaluation.evaluate_every == 0:
            figures |= self._evaluate("after" if last else None)
        figures |= session.record(position.iteration, figures)
        for alarm in alarms(self._run.log.of(PHASE)):
            session.message(f"generation batch {position.iteration}: {alarm}")
        shown = ("reward", "length", "entropy", "ratio_max", "clipped", "heldout_reward", "tokens_per_second")
        session.show(position.iteration, {name.replace("_per_second", "/s"): figures.get(name) for name in shown})
        session.checkpoint(position.iteration * recipe.update.updates, lambda: self._place({}), last=last)

    def _evaluate(self, samples: str | None) -> dict[str, float]:
        """Figures of held-out problems; `samples` names a file to show some responses in."""
        rounds, version = self._recipe.evaluation.evaluate_rounds, self._position.iteration
        scored = self._stream.run(
            lambda experience, params: experience.heldout(params, version, rounds), self.state.params
        )
        if samples is not None and processes.writes():
            write_samples(scored, self._run.directory / f"samples_{samples}.md")
        figures = summary(scored) | marks(scored, self._same).figures()
        return {f"heldout_{name}": value for name, value in figures.items()}

    def _restored(self) -> Updates | None:
        """Goes to where the training was left; the generation batch that it was left in, if there is one."""
        place, recipe = self._session.place, self._recipe
        if place is None:
            self._session.message(f"loss: {recipe.loss.chosen}")
            heldout = self._evaluate("before")
            self._session.record(0, heldout)
            self._session.message(f"held-out reward before: {heldout['heldout_reward']:.3f}")
            return None
        self._position = Position.from_json(place.state["position"])
        self._stream.restore(place.state["stream"], place.arrays["stream"])
        updates = place.arrays.get("updates")
        if not updates:
            return None
        return Updates(RLBatch.of(**updates)).cut(recipe.update.rows, recipe.micro_batches)
