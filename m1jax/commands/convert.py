"""`m1jax convert SRC DST`: official files <-> Transformers' <-> our checkpoints."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from m1jax.convert.pieces import Piece
from m1jax.convert.sources import Checkpoint, Source, open_source
from m1jax.convert.stream import convert
from m1jax.convert.targets import CheckpointTarget, FilesTarget, Target
from m1jax.errors import UserError
from m1jax.weights.names import tensors
from m1jax.weights.safetensors import DTYPES, SHARD_BYTES

BY_NAME = {"bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"], "float32": DTYPES["F32"]}


@dataclasses.dataclass(frozen=True)
class Config:
    """Converts a model between the authors' files, Transformers' and our checkpoints.

    Interrupted conversions go on where they stopped when the same command is run again.
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A directory of safetensors files; a checkpoint; or a run or directory of checkpoints, of which the newest is
    taken."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The directory to make."""
    to: Literal["official", "transformers", "orbax"] | None = None
    """What to make. Default: official files from a checkpoint, a checkpoint from anything else."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the result; routers stay float32. Default: as in the source."""
    experts: Literal["split", "merged"] = "split"
    """Transformers' files only: one tensor per expert, as everybody reads them, or w1 and w3 of all experts of a layer
    in one as Transformers holds them in memory. Checkpoints always keep the experts of a layer together."""
    shard_gb: float = SHARD_BYTES / 1e9
    """Size at which a new safetensors file begins, in GB."""
    dry_run: bool = False
    """Print the table of tensors and where they would go, and write nothing."""
    threads: int = 2 * (os.cpu_count() or 1)
    """Pieces copied at once."""
    process_index: int = 0
    """Which of `process-count` processes this is; all need the same arguments and file system."""
    process_count: int = 1
    """How many processes share the work."""


def main(config: Config) -> None:
    """Runs one conversion.

    Raises:
        UserError: source or target are not what they should be, the disk is full, or the result differs from the
            source. What is done stays beside the target and is used when the command is run again.
    """
    if not 0 <= config.process_index < config.process_count:
        raise UserError(f"process-index {config.process_index} must lie below process-count {config.process_count}")
    source = open_source(config.src)
    kind = config.to or ("official" if isinstance(source, Checkpoint) else "orbax")
    if config.experts == "merged" and kind != "transformers":
        raise UserError("experts=merged is a form of Transformers' files: it needs --to transformers")
    if not 0 < config.shard_gb < 1e9 or config.threads < 1:
        raise UserError("shard-gb and threads must be positive numbers")
    dtype = None if config.dtype is None else BY_NAME[config.dtype]
    if kind == "orbax":
        target: Target = CheckpointTarget(source, config.dst, dtype)
    else:
        target = FilesTarget(source, config.dst, dtype, kind, config.experts, int(config.shard_gb * 1e9))
    if config.dry_run:
        _print_table(source, target)
        return
    _refuse_source_as_target(config)
    convert(source, target, threads=config.threads, process=config.process_index, processes=config.process_count)


def _refuse_source_as_target(config: Config) -> None:
    source, target = config.src.resolve(), config.dst.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise UserError(f"source {config.src} and target {config.dst} must be different directories")


def _print_table(source: Source, target: Target) -> None:
    first: dict[str, tuple[Piece, int]] = {}
    for piece in target.pieces:
        found, count = first.get(piece.tensor.name, (piece, 0))
        first[piece.tensor.name] = (found, count + 1)
    total = 0
    for tensor in tensors(source.config):
        piece, count = first[tensor.name]
        before, after = source.dtypes[tensor.name], target.dtypes[tensor.name]
        cast = str(before) if before == after else f"{before} -> {after}"
        ours = ".".join(map(str, tensor.path)) + (f"[{', '.join(map(str, tensor.index))}]" if tensor.index else "")
        where = f"{piece.file} @ {piece.start:,}" + (f" and {count - 1} more" if piece.start == 0 and count > 1 else "")
        print(f"{tensor.name}  {list(tensor.shape)}  {cast}  {ours}  {where}")
        total += tensor.size * after.itemsize
    parameters = sum(t.size for t in tensors(source.config))
    print(
        f"{len(first):,} tensors, {parameters:,} parameters, {total:,} bytes in {len(target.sizes):,} files; "
        f"nothing was written"
    )
