"""Supervised fine-tuning on prompts and responses: `m1jax train sft`, and the warm start of the demo."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from m1jax.chat import Tokenizer
from m1jax.checkpoint import Checkpoints
from m1jax.convert.pretrained import from_pretrained, save_pretrained
from m1jax.errors import UserError, require_positive
from m1jax.model import MiniMaxM1
from m1jax.train import packing
from m1jax.train.data import read_prompt_answers
from m1jax.train.guards import NonFiniteGuard, OnNonFinite
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.progress import Reporter
from m1jax.train.run import Run
from m1jax.train.step import LossFn, init_state, make_train_step

Pair = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRecipe:
    """How to fine-tune."""

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, warmup_steps=20, final_fraction=0.1)
    )
    steps: int = 500
    """updates"""
    batch: int = 32
    """sequences per update"""
    row_length: int = 1024
    """tokens per row; several sequences share a row, and none may be longer"""
    rows: int = 8
    """rows per micro-batch; the result does not depend on it, memory does"""
    remat: bool = False
    """recompute layers in the backward pass: less memory, more time"""
    checkpoint_every: int = 100
    """updates between checkpoints"""
    log_every: int = 10
    """updates between lines of metrics.jsonl"""
    on_nonfinite: OnNonFinite = "stop"
    """what to do when a loss or gradient is not finite"""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch", "row_length", "rows", "checkpoint_every", "log_every")


def supervised_loss(graph: Any, aux_coefficient: float, remat: bool = False) -> LossFn:
    """Cross-entropy of the responses plus the routers' balancing loss, as `loss_fn(params, micro-batch)`.

    The micro-batch holds tokens, targets, segment_ids [R, L] int32 and weight [R, L] float32, which sums to 1 over the
    response tokens of the whole batch: the loss is their mean, in nats.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        model: MiniMaxM1 = nnx.merge(graph, params)
        states = model.hidden_states(batch["tokens"], segment_ids=batch["segment_ids"], remat=remat)
        log_prob, _ = model.log_probs(states.hidden, batch["targets"])
        nll = -jnp.sum(batch["weight"] * log_prob)
        aux = jnp.sum(batch["weight"] * states.aux_loss)
        return nll + aux_coefficient * aux, {"nll": nll, "balance": aux}

    return loss_fn


def sft(run: Run, model: MiniMaxM1, pair: Callable[[int], Pair], recipe: SFTRecipe, *, phase: str = "sft") -> MiniMaxM1:
    """Trains, or goes on from the newest checkpoint; the result is the same to the bit.

    Args:
        run: where checkpoints and metrics go.
        model: where to start.
        pair: number of a sequence -> (prompt, response) tokens; must be a pure function, so that a counter is all
            there is to resume.
        recipe: how.
        phase: name of this training within the run.

    Returns:
        The trained model.

    Raises:
        UserError: a sequence does not fit into a row, or what `Checkpoints` and `NonFiniteGuard` raise.
    """
    graph, params = nnx.split(model)
    optimizer = recipe.optimizer.build(recipe.steps)
    step_fn = make_train_step(supervised_loss(graph, model.config.router_aux_loss_coef, recipe.remat), optimizer)
    state = init_state(params, optimizer)
    guard = NonFiniteGuard(run.directory, recipe.on_nonfinite)
    seconds, tokens, start = 0.0, 0, 0
    with Checkpoints(run.checkpoints_of(phase), config=model.config, keep=2) as checkpoints:
        found = checkpoints.restore(params=params, state=state._replace(params=()))
        if found is not None:
            state, start = found.state._replace(params=found.params), found.step
            seconds, tokens = found.meta["seconds"], found.meta["tokens"]
        run.log.resume(phase, start if found is not None else -1)
        with Reporter(phase.upper(), recipe.steps, start) as reporter:
            clock = time.monotonic()
            for step in range(start, recipe.steps):
                batch = _batch([pair(i) for i in range(step * recipe.batch, (step + 1) * recipe.batch)], recipe)
                state, stats = step_fn(state, batch, packing.filled_micro_batches(batch))
                stats = {name: float(value) for name, value in jax.device_get(stats).items()}
                guard.check(step + 1, stats.pop("skipped"), batch, stats)
                tokens += int((batch["segment_ids"] != packing.PADDING).sum())
                now = time.monotonic()
                seconds, clock = seconds + now - clock, now
                rate = {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}
                done, last = step + 1, step + 1 == recipe.steps
                reporter.update(done, {"loss": stats["nll"], "tokens/s": rate["tokens_per_second"]})
                if done % recipe.log_every == 0 or last:
                    run.log.append(phase, done, {**stats, **rate})
                if done % recipe.checkpoint_every == 0 or last:
                    meta = {"seconds": seconds, "tokens": tokens}
                    checkpoints.save(done, params=state.params, state=state._replace(params=()), meta=meta)
    return nnx.merge(graph, state.params)


def _batch(pairs: list[Pair], recipe: SFTRecipe) -> dict[str, np.ndarray]:
    weight = 1.0 / sum(len(response) for _, response in pairs)
    examples = [packing.example(prompt, response, weight=weight) for prompt, response in pairs]
    longest = max(len(example["tokens"]) for example in examples)
    if longest > recipe.row_length:
        raise UserError(f"sft: a sequence has {longest + 1} tokens, row_length is {recipe.row_length}; raise it")
    # One row per sequence at worst: a fixed number of micro-batches, filled or not, is one compiled shape.
    count = -(-recipe.batch // recipe.rows)
    return packing.micro_batches(packing.pack(examples, recipe.row_length), recipe.rows, count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a model on your own prompts and answers.

    m1jax train sft models/my-model --data train.jsonl --name my-run
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory of the model to start from: config.json, *.safetensors, tokenizer.json."""
    data: Path
    """JSON lines {"prompt": "...", "answer": "..."}; the answer is what the model learns to write."""
    name: str = "sft"
    """The run's results go to RUNS/NAME; a run that was interrupted goes on where it was."""
    runs: Path = Path("runs")
    seed: int = 0
    """Order of the data."""
    recipe: tyro.conf.OmitArgPrefixes[SFTRecipe] = dataclasses.field(default_factory=SFTRecipe)


def main(config: Config) -> None:
    """Trains and writes the model to RUNS/NAME/export."""
    pairs = read_prompt_answers(config.data)
    tokenizer = Tokenizer.from_dir(config.model)
    model = from_pretrained(config.model)
    run = Run(config.runs / config.name, {"command": "train sft", "model_config": model.config, **vars(config)})
    orders: dict[int, np.ndarray] = {}

    def pair(number: int) -> Pair:
        epoch, place = divmod(number, len(pairs))
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng([config.seed, epoch]).permutation(len(pairs))
        prompt, answer = pairs[orders[epoch][place]]
        return tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id]

    model = sft(run, model, pair, config.recipe)
    save_pretrained(model, run.directory / "export")
    tokenizer.save(run.directory / "export")
