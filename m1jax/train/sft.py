"""Supervised fine-tuning on conversations or prompts and answers: `m1jax train sft`, and the warm start of the demo."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import grain
import tyro

from m1jax.chat import Tokenizer
from m1jax.errors import UserError, require_positive, require_seed
from m1jax.model import MiniMaxM1
from m1jax.train import packing, placement
from m1jax.train.batch import Batch
from m1jax.train.data import ENDLESS, Conversations, load_tokenizer, mixture, weighted
from m1jax.train.loop import Batches, LoopRecipe, fit
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Branch, Run, free, run_directory
from m1jax.weights.pretrained import save_pretrained

Pair = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRecipe(LoopRecipe):
    """How to fine-tune."""

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, warmup_steps=20, final_fraction=0.1)
    )
    batch: int = 32
    """sequences per update"""
    row_length: int = 1024
    """tokens per row; several sequences share a row, and none may be longer"""
    rows: int = free(8)
    """rows per micro-batch; the result does not depend on it, memory does"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "batch", "row_length", "rows")


def sft(
    run: Run,
    model: MiniMaxM1,
    pair: Callable[[int], Pair],
    recipe: SFTRecipe,
    *,
    phase: str = "sft",
    profile: bool = False,
) -> MiniMaxM1:
    """Trains, or goes on from the newest checkpoint; see `loop.fit`.

    Args:
        run: where checkpoints and metrics go.
        model: where to start.
        pair: number of a sequence -> (prompt, response) tokens; must be a pure function, so that a counter is all
            there is to resume.
        recipe: how.
        phase: name of this training within the run.
        profile: trace some updates.

    Returns:
        The trained model.

    Raises:
        UserError: a sequence does not fit into a row, or what `loop.fit` raises.
    """

    examples = grain.MapDataset.range(ENDLESS).map(lambda number: packing.example(*pair(int(number))))
    return fit(run, model, batches(examples, recipe), recipe, phase=phase, profile=profile)


def batches(examples: grain.MapDataset, recipe: SFTRecipe) -> Batches:
    """Update k trains on examples k * batch ... (k + 1) * batch - 1, packed; each process reads only its share of them.

    The loss's mean does not depend on which row an example is in, so processes pack their shares by themselves.
    """
    share, shares = placement.share_of_rows()
    for name in ("batch", "rows"):
        if getattr(recipe, name) % shares:
            raise UserError(f"sft: {name} = {getattr(recipe, name)} cannot be shared out over {shares} processes")
    size, rows = recipe.batch // shares, recipe.rows // shares
    # One row per example at worst: a fixed number of micro-batches, filled or not, is one compiled shape.
    count = -(-size // rows)

    def packed(examples: Sequence[Batch]) -> Batch:
        longest = max(example.positions for example in examples)
        if longest > recipe.row_length:
            raise UserError(f"sft: a sequence has {longest + 1} tokens, row_length is {recipe.row_length}; raise it")
        return packing.micro_batches(packing.pack(examples, recipe.row_length), rows, count)

    # One thread prepares the next batches while the devices work.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(examples.slice(slice(share, ENDLESS, shares)).batch(size, batch_fn=packed).to_iter_dataset(ahead))


def held_out(examples: Sequence[Batch], rows: int, row_length: int) -> Batch:
    """All examples, packed into micro-batches of which this process holds its share of the rows."""
    share, shares = placement.share_of_rows()
    packed = packing.micro_batches(packing.pack(examples, row_length), rows)
    return packed.map(lambda x: x[:, share * rows // shares : (share + 1) * rows // shares])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a model on your own conversations, or prompts and answers.

    m1jax train sft models/my-model --data train.jsonl --name my-run
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory of the model to start from: config.json, *.safetensors, tokenizer.json."""
    data: tuple[str, ...]
    """JSON lines {"messages": [{"role": ..., "content": ...}, ...]}, of which the assistant's words are learned, or
    {"prompt": "...", "answer": "..."}, of which the answer is. Several files are mixed: a.jsonl=3 b.jsonl=1 takes
    three lines of the first for one of the second."""
    eval_data: tuple[str, ...] = ()
    """Held-out lines like those of --data, whose loss is measured every --evaluate-every updates."""
    name: str = "sft"
    """The run's results go to RUNS/NAME; a run that was interrupted goes on where it was."""
    runs: Path = Path("runs")
    branch: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN[:STEP]")] = None
    """Begin a new run at another one's newest checkpoint, or at that of a step; any option of training may differ."""
    seed: int = 0
    """Order of the data."""
    mesh: str = ""
    """How the devices share the work, for example fsdp=4,tensor=2 (docs/multihost.md); one device without it."""
    profile: bool = False
    """Trace three updates into RUNS/NAME/profile, for xprof or TensorBoard."""
    recipe: tyro.conf.OmitArgPrefixes[SFTRecipe] = dataclasses.field(default_factory=SFTRecipe)


def main(config: Config) -> None:
    """Trains and writes the model to RUNS/NAME/export."""
    require_seed(config.seed)
    directory, recipe = run_directory(config.runs, config.name), config.recipe
    branch = None if config.branch is None else Branch.parse(config.branch)
    with placement.use_mesh(config.mesh):
        tokenizer = load_tokenizer(config.model)
        files = weighted(config.data)
        sources = [(Conversations(path, tokenizer, recipe.row_length), weight) for path, weight in files]
        others = [Conversations(path, tokenizer, recipe.row_length) for path in config.eval_data]
        examples = mixture(sources, seed=(config.seed,))
        model = placement.load_model(config.model, [(recipe.rows, recipe.row_length)])
        heldout = [lines[index] for lines in others for index in range(len(lines))]
        settings = {
            "command": "train sft",
            "model_config": model.config,
            "model": config.model,
            "data": [(Path(path), weight) for path, weight in files],
            "seed": config.seed,
            "recipe": recipe,
        }
        run = Run(directory, settings, branch=branch)
        model = fit(
            run,
            model,
            batches(examples, recipe),
            recipe,
            phase="sft",
            heldout=held_out(heldout, recipe.rows, recipe.row_length) if heldout else None,
            profile=config.profile,
        )
        export(run, model, tokenizer)


def export(run: Run, model: MiniMaxM1, tokenizer: Tokenizer) -> None:
    """Writes the model to the run's `export/`, in the compute dtype, and closes the log."""
    save_pretrained(model, run.directory / "export", dtype=model.dtype, tokenizer=tokenizer)
    run.log.close()
