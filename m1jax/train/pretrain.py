"""Continual pre-training on documents, the context growing in stages: `m1jax train pretrain`.

The report (section 2): 7.5 T tokens, the learning rate constant at 8e-5 for a third of them, then falling to 8e-6; the
context goes from 32K to 1M tokens in four stages, because training on long sequences at once made gradients explode.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import grain
import numpy as np
import tyro

from m1jax.errors import UserError, require_positive, require_seed
from m1jax.train import placement
from m1jax.train.batch import Batch
from m1jax.train.data import ENDLESS, Documents, load_tokenizer, mixture, weighted
from m1jax.train.loop import LoopRecipe, fit
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Branch, Run, free, run_directory
from m1jax.train.session import Json
from m1jax.train.sft import export, held_out
from pallas_kernels import PADDING


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRecipe(LoopRecipe):
    """How to pre-train; the defaults are the report's where it gives a number."""

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=8e-5, warmup_steps=100, constant_fraction=1 / 3, final_fraction=0.1
        )
    )
    steps: int = free(10_000)
    context: str = "32k"
    """tokens per row, growing: LENGTH:UPDATES, the last one to the end, as in 32k:6000,128k:2000,512k:1000,1m (the
    report's four stages; the two in the middle and how long each takes are not published)"""
    batch_tokens: int = 2**20
    """per update, at any length"""
    micro_batch_tokens: int = free(2**15)
    """computed at once: a multiple of the longest context; the result does not depend on it, memory does"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "batch_tokens", "micro_batch_tokens")
        for length, _ in self.stages:
            if self.micro_batch_tokens % length:
                raise UserError(
                    f"pretrain: a context of {length} does not divide micro_batch_tokens = {self.micro_batch_tokens}"
                )
        if self.batch_tokens % self.micro_batch_tokens:
            raise UserError(
                f"pretrain: micro_batch_tokens = {self.micro_batch_tokens} does not divide "
                f"batch_tokens = {self.batch_tokens}"
            )

    @property
    def stages(self) -> list[tuple[int, int]]:
        """(tokens per row, update after which the next stage begins) of every stage."""
        found, end = [], 0
        parts = self.context.split(",")
        for number, part in enumerate(parts, 1):
            match = re.fullmatch(r"(\d+)([km]?)(?::(\d+))?", part.strip().lower())
            if match is None or int(match[1]) == 0 or (match[3] is None) != (number == len(parts)):
                raise UserError(f"pretrain: context {self.context!r}: write LENGTH:UPDATES,LENGTH, as in 32k:100,1m")
            end = self.steps if match[3] is None else end + int(match[3])
            found.append((int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2]], end))
        lengths = [length for length, _ in found]
        if sorted(lengths) != lengths:
            raise UserError(f"pretrain: context {self.context!r} shrinks; a stage must be as long as the one before")
        if sorted(end for _, end in found) != [end for _, end in found] or end > self.steps:
            raise UserError(f"pretrain: the stages of context {self.context!r} need more than steps = {self.steps}")
        return found

    def rows(self, length: int) -> int:
        """Rows per micro-batch."""
        return self.micro_batch_tokens // length


class Rows:
    """Rows full of documents, each row of an update a stream of its own (`loop.Batches`).

    Row n of R takes documents n, n + R, ... of the mixture, one behind the other, cut where the row ends; what is cut
    goes on as another segment of the stream's next row, without what came before. So what a row holds does not depend
    on which process reads it.

    Args:
        documents: number of a stage -> the mixture to read in it.
        recipe: lengths and sizes.
    """

    def __init__(self, documents: Callable[[int], grain.MapDataset], recipe: PretrainRecipe):
        self._documents, self._recipe = documents, recipe
        self._stages = recipe.stages
        self._update, self._stage = 0, -1
        self._mine: list[int] = []
        self._iterator: Any = None

    def __next__(self) -> Batch:
        stage = next(s for s, (_, end) in enumerate(self._stages) if self._update < end)
        if stage != self._stage:
            self._open(stage)
        self._update += 1
        return next(self._iterator)

    def get_state(self) -> Json:
        """The place in every stream, of all processes."""
        places = dict(zip(map(str, self._mine), self._iterator.get_state()["parents"]))
        return {"update": self._update, "stage": self._stage, "streams": _united(places)}

    def set_state(self, state: Json) -> None:
        self._open(state["stage"])
        places = [dict(state["streams"][str(number)]) for number in self._mine]
        for place in places:  # JSON has no tuples, and grain compares with one
            place["remainder_slices"] = {name: tuple(cut) for name, cut in place["remainder_slices"].items()}
        self._iterator.set_state({"parents": places})
        self._update = state["update"]

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()

    def _open(self, stage: int) -> None:
        self.close()
        self._stage = stage
        length = self._stages[stage][0]
        rows, count = self._recipe.rows(length), self._recipe.batch_tokens // self._recipe.micro_batch_tokens
        share, shares = placement.share_of_rows()
        if rows % shares:
            raise UserError(f"pretrain: {rows} rows of {length} tokens cannot be shared out over {shares} processes")
        here = range(share * rows // shares, (share + 1) * rows // shares)
        self._mine = [batch * rows + row for batch, row in itertools.product(range(count), here)]
        lengths = {name: length for name in Batch.columns() if name != "segment_ids"}
        # grain cuts dictionaries, and counts segments itself.
        documents = self._documents(stage).map(lambda document: {name: getattr(document, name) for name in lengths})

        def stream(number: int) -> grain.IterDataset:
            mine = documents.slice(slice(number, ENDLESS, count * rows))
            one_by_one = mine.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            return grain.experimental.ConcatThenSplitIterDataset(one_by_one, length_struct=lengths)

        def batch(streams: Sequence[Mapping[str, np.ndarray]]) -> Batch:
            fields = {name: np.stack([row[name] for row in streams]) for name in lengths}
            # From 1 on; 0 is padding.
            segments = np.stack([row["tokens_segment_ids"] for row in streams])
            fields["segment_ids"] = np.where(segments == 0, PADDING, segments - 1).astype(np.int32)
            return Batch.of(**fields).map(lambda x: x.reshape(count, len(here), length))

        together = grain.experimental.ZipIterDataset([stream(number) for number in self._mine]).map(batch)
        # One thread prepares the next batches while the devices work.
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(together, prefetch_buffer_size=2))


def _united(mine: dict[str, Any]) -> dict[str, Any]:
    """The entries of all processes' dictionaries."""
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    longest = int(placement.gathered(np.array(len(text), np.int32)).max())
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    united: dict[str, Any] = {}
    for other in placement.gathered(padded):
        united |= json.loads(other.tobytes())
    return united


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Pre-train a model further on documents.

    m1jax train pretrain models/my-model --data web.jsonl=3 code.jsonl=1 --name my-run
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory of the model to start from: config.json, *.safetensors, tokenizer.json."""
    data: tuple[str, ...]
    """JSON lines {"text": "..."}, a document each. Several files are mixed: a.jsonl=3 b.jsonl=1 takes three documents
    of the first for one of the second. Every stage of the context goes through them in another order."""
    eval_data: tuple[str, ...] = ()
    """Held-out documents like those of --data, whose loss is measured every --evaluate-every updates, in rows of the
    longest context."""
    name: str = "pretrain"
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
    recipe: tyro.conf.OmitArgPrefixes[PretrainRecipe] = dataclasses.field(default_factory=PretrainRecipe)


def main(config: Config) -> None:
    """Trains and writes the model to RUNS/NAME/export."""
    require_seed(config.seed)
    directory, recipe = run_directory(config.runs, config.name), config.recipe
    branch = None if config.branch is None else Branch.parse(config.branch)
    with placement.use_mesh(config.mesh):
        tokenizer = load_tokenizer(config.model)
        files = weighted(config.data)
        sources = [(Documents(path, tokenizer), weight) for path, weight in files]
        others = [Documents(path, tokenizer) for path in config.eval_data]
        longest = recipe.stages[-1][0]
        model = placement.load_model(config.model, [(recipe.rows(length), length) for length, _ in recipe.stages])
        pieces = [piece for lines in others for n in range(len(lines)) for piece in _pieces(lines[n], longest)]
        settings = {
            "command": "train pretrain",
            "model_config": model.config,
            "model": config.model,
            "data": [(Path(path), weight) for path, weight in files],
            "seed": config.seed,
            "recipe": recipe,
        }
        run = Run(directory, settings, branch=branch)
        rows = Rows(lambda stage: mixture(sources, seed=(config.seed, stage)), recipe)
        heldout = held_out(pieces, recipe.rows(longest), longest) if pieces else None
        model = fit(run, model, rows, recipe, phase="pretrain", heldout=heldout, profile=config.profile)
        export(run, model, tokenizer)


def _pieces(document: Batch, longest: int) -> list[Batch]:
    """Cut so that each fits into a row; each knows nothing of those before it, as in training."""
    return [document.map(lambda x, at=at: x[at : at + longest]) for at in range(0, document.positions, longest)]
