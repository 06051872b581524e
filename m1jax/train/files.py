"""Files as records by number: JSON lines, also compressed, Parquet and plain text.

A record is an object with texts and numbers, as JSON has them. Whatever the format, a file is read where a record is
asked for and not into memory, and a message can say where a record is.
"""

import array
import bisect
import gzip
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from m1jax.errors import UserError

BOM = b"\xef\xbb\xbf"  # some editors begin UTF-8 with it
DOCUMENTS = 64  # at least so many make a text file that is large enough, so that the rows of a batch differ
SHORTEST, LONGEST = 1 << 10, 1 << 16  # bytes of one of them


class Records(Protocol):
    """The records of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UserError, saying where, for what is no record."""
        ...

    def where(self, index: int) -> str:
        """The place of a record, such as "train.jsonl, line 3"."""
        ...


def open_records(path: str | os.PathLike[str], expected: str, columns: Sequence[str] | None = None) -> Records:
    """The records of a file, by the ending of its name: .parquet, .txt or .md, else JSON lines; .gz behind it.

    Args:
        path: the file; text is UTF-8.
        expected: how a record should look, for messages.
        columns: of Parquet, those that are read; None reads all.

    Raises:
        UserError: the file is missing, damaged or without a record.
    """
    path = Path(path)
    endings = [ending.lower() for ending in path.suffixes]
    compressed = endings[-1:] == [".gz"]
    kind = "".join(endings[-2:-1] if compressed else endings[-1:])
    try:
        with open(path, "rb") as file:
            if kind == ".parquet":
                return Parquet(path, file, expected, columns)
            data = _decompressed(path, file) if compressed else _mapped(file)
    except OSError as error:
        if error.filename is None:  # of a temporary file
            raise
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    records = Text(path, data) if kind in (".txt", ".md") else JsonLines(path, data, expected)
    if not len(records):
        raise UserError(f"{path}: no lines in it; expected {expected}")
    return records


class _Pieces:
    """Pieces of a text file, each of whole lines."""

    def __init__(self, path: Path, data: bytes | mmap.mmap, size: int):
        """Cuts at the first end of a line behind every `size` bytes; nothing is kept of pieces that are blank."""
        self._path, self._data = path, data
        # The first line's number, first byte and last byte of every piece: a file may have millions.
        self._numbers, self._starts, self._stops = array.array("q"), array.array("q"), array.array("q")
        start, number = len(BOM) if data[: len(BOM)] == BOM else 0, 1
        while start < len(data):
            stop = data.find(b"\n", min(start + size, len(data)) - 1) + 1 or len(data)
            piece = data[start:stop]
            if piece.strip():
                self._numbers.append(number)
                self._starts.append(start)
                self._stops.append(stop)
            start, number = stop, number + piece.count(b"\n")

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        return f"{self._path}, line {self._numbers[index]}"

    def text(self, index: int) -> str:
        try:
            return self._data[self._starts[index] : self._stops[index]].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


class JsonLines(_Pieces):
    """One object per line that is not empty."""

    def __init__(self, path: Path, data: bytes | mmap.mmap, expected: str):
        super().__init__(path, data, 1)
        self._expected = expected

    def __getitem__(self, index: int) -> dict[str, Any]:
        where, expected = self.where(index), self._expected
        try:
            record = json.loads(self.text(index))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}, column {error.colno}: not JSON ({error.msg}); expected {expected}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
            raise UserError(f"{where}: not to be read as JSON ({error}); expected {expected}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a {type(record).__name__}, not an object; expected {expected}")
        return record


class Text(_Pieces):
    """Plain text, cut into documents `{"text": ...}` of about the same length."""

    def __init__(self, path: Path, data: bytes | mmap.mmap):
        super().__init__(path, data, min(max(len(data) // DOCUMENTS, SHORTEST), LONGEST))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": self.text(index)}


class Parquet:
    """The rows of a Parquet file; what is null is left out.

    Parquet is compressed in blocks of many rows, but training asks for one row here and one there: so the file is
    unpacked once, into a temporary one that is looked up by number.
    """

    def __init__(self, path: Path, file: IO[bytes], expected: str, columns: Sequence[str] | None):
        try:
            import pyarrow as arrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
        self._path = path
        try:
            table = pyarrow.parquet.ParquetFile(file)
            there = table.schema_arrow
            wanted = [field for field in there if columns is None or field.name in columns]
            if not wanted:
                raise UserError(f"{path}: its columns are {', '.join(there.names) or 'none'}; expected {expected}")
            with tempfile.NamedTemporaryFile(suffix=".arrow") as to:  # its contents go with the last user
                with arrow.ipc.new_file(to.file, arrow.schema(wanted)) as unpacked:
                    for batch in table.iter_batches(1024, columns=[field.name for field in wanted]):
                        unpacked.write_batch(batch)
                to.flush()
                reader = arrow.ipc.open_file(arrow.memory_map(to.name))
                self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (arrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own has none
                raise
            raise UserError(f"{path}: not a whole Parquet file ({error}); copy it again") from error
        self._ends: list[int] = []
        for batch in self._batches:
            self._ends.append((self._ends[-1] if self._ends else 0) + batch.num_rows)
        if not len(self):
            raise UserError(f"{path}: no rows in it; expected {expected}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches[number]
        return _without_nulls(batch.slice(index - (self._ends[number] - batch.num_rows), 1).to_pylist()[0])

    def where(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _mapped(file: IO[bytes]) -> bytes | mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _decompressed(path: Path, file: IO[bytes]) -> bytes | mmap.mmap:
    with tempfile.TemporaryFile() as to:  # its contents go with the last user
        try:
            with gzip.open(file) as compressed:
                shutil.copyfileobj(compressed, to, 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file ({error}); copy it again") from error
        to.flush()
        return _mapped(to)
