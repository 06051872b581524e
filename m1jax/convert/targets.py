"""What a conversion makes: every byte's place, known before the first is written, and how the result is completed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from m1jax.config import Layout, ModelConfig
from m1jax.convert import zarr
from m1jax.convert.pieces import Piece, cut, rows_of_piece
from m1jax.convert.sources import Source
from m1jax.disk import put_in_place, sync
from m1jax.errors import UserError
from m1jax.weights.directory import CONFIG, check_replaceable, copy_companions, name_end_token
from m1jax.weights.names import tensors, transformers_merged
from m1jax.weights.safetensors import INDEX, Plan


class Target(Protocol):
    """A model being written, beside its place until it is whole."""

    final: Path
    """where it will be"""
    directory: Path
    """where it is written"""
    dtypes: dict[str, np.dtype]
    """of each official tensor"""
    pieces: list[Piece]
    sizes: dict[str, int]
    """bytes of each file that holds pieces"""
    heads: dict[str, bytes]
    """what stands in such a file in front of the tensors"""

    def check_free(self) -> None:
        """Raises UserError where something else has its name."""
        ...

    def complete(self, checksums: Mapping[int, int]) -> None:
        """Writes what is missing once all pieces are there; CRC-32 by number of the piece."""
        ...

    def put_in_place(self) -> None:
        """Gives the result its name."""
        ...


def stored_dtypes(source: Source, dtype: np.dtype | None) -> dict[str, np.dtype]:
    """The dtype of each tensor in the target; None: as in the source. Routers are float32 whatever it is."""
    return {
        t.name: np.dtype(np.float32) if t.router else (dtype or source.dtypes[t.name]) for t in tensors(source.config)
    }


class FilesTarget:
    """A directory of safetensors files in the authors' or Transformers' layout.

    Args:
        source: what is converted.
        final: the directory to make.
        dtype: of all but the routers; None: as in the source.
        layout: which config.json.
        experts: one tensor per expert, or merged as Transformers has them in memory.
        shard_bytes: size at which a new file begins.
    """

    def __init__(
        self,
        source: Source,
        final: Path,
        dtype: np.dtype | None,
        layout: Layout,
        experts: Literal["split", "merged"],
        shard_bytes: int,
    ) -> None:
        self.final = final.resolve()
        self.directory = self.final.parent / f".{self.final.name}.converting"
        self.dtypes = stored_dtypes(source, dtype)
        self._companions = source.companions
        table = tensors(source.config)
        if experts == "merged":
            merged = transformers_merged(source.config)
            plan = Plan(((m.name, m.shape, self.dtypes[m.parts[0][0]]) for m in merged), shard_bytes=shard_bytes)
            plan.place_parts(merged)
        else:
            plan = Plan(((t.name, t.shape, self.dtypes[t.name]) for t in table), shard_bytes=shard_bytes)
        self._plan, self.sizes, self.heads = plan, plan.sizes, plan.headers
        self.pieces = []
        for tensor in table:
            entry = plan.entries[tensor.name]
            for first, stop in cut(tensor, entry.dtype):
                start = entry.start + first * entry.count // tensor.shape[0]
                self.pieces.append(Piece(tensor, first, stop, entry.file.name, start))
        self._config = source.config.to_hf(layout)
        self._config["torch_dtype" if layout == "official" else "dtype"] = str(self.dtypes["model.embed_tokens.weight"])

    def check_free(self) -> None:
        check_replaceable(self.final)

    def complete(self, checksums: Mapping[int, int]) -> None:
        if (index := self._plan.index()) is not None:
            (self.directory / INDEX).write_bytes(index)
            sync(self.directory / INDEX)
        (self.directory / CONFIG).write_text(json.dumps(self._config, indent=2, sort_keys=True) + "\n")
        sync(self.directory / CONFIG)
        copy_companions(self._companions, self.directory)
        name_end_token(self.directory)

    def put_in_place(self) -> None:
        put_in_place(self.directory, self.final)


class CheckpointTarget:
    """A directory with one checkpoint, of step 0, that holds parameters only.

    Args:
        source: what is converted.
        final: the directory to make.
        dtype: of all but the routers; None: as in the source.
    """

    def __init__(self, source: Source, final: Path, dtype: np.dtype | None) -> None:
        self.final = final.resolve()
        self.directory = self.final / f"{zarr.STEP}.converting"
        self.dtypes = stored_dtypes(source, dtype)
        self._config: ModelConfig = source.config
        self._companions = source.companions
        merged = {t.path + t.index: t for t in tensors(source.config, merged_experts=True)}
        self._arrays: dict[str, zarr.ArrayFile] = {}
        self.pieces, self.sizes, self.heads = [], {}, {}
        for tensor in tensors(source.config):
            whole = merged[tensor.path + tensor.index[:1]]
            dtype, rows = self.dtypes[tensor.name], rows_of_piece(tensor, self.dtypes[tensor.name])
            chunk = (*(1,) * (len(whole.shape) - len(tensor.shape)), rows, *tensor.shape[1:])
            self._arrays[whole.name] = zarr.ArrayFile(whole.shape, dtype, chunk)
            for first, stop in cut(tensor, dtype):
                file = zarr.chunk_file(whole.name, (*tensor.index[1:], first // rows), len(whole.shape))
                piece = Piece(tensor, first, stop, file, 0)
                self.pieces.append(piece)
                self.sizes[file] = piece.nbytes(dtype)
                self.heads[file] = b""

    def check_free(self) -> None:
        if self.final.exists() and not self.final.is_dir():
            raise UserError(f"{self.final} is a file; give the name of a new directory")
        others = [p.name for p in self.final.iterdir() if p != self.directory] if self.final.is_dir() else []
        if others:
            raise UserError(f"{self.final} is not empty ({others[0]}); give the name of a new directory")

    def complete(self, checksums: Mapping[int, int]) -> None:
        sums = {self.pieces[number].file: checksum for number, checksum in checksums.items()}
        zarr.complete(self.directory, self._config, self._arrays, sums)
        copy_companions(self._companions, self.directory)

    def put_in_place(self) -> None:
        put_in_place(self.directory, self.final / str(zarr.STEP))
