"""Event files that TensorBoard reads, written here and now.

tensorboardX's own `SummaryWriter` writes in a thread: of a full disk one learns from that thread's traceback, and the
training goes on without.
"""

import contextlib
import socket
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from m1jax.disk import writing


class Events:
    """A new event file.

    Args:
        directory: made if missing.

    Raises:
        UserError: it cannot be written; so do the methods.
    """

    def __init__(self, directory: Path):
        self._file = directory / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        with writing(self._file):
            directory.mkdir(exist_ok=True)
            self._records = RecordWriter(str(self._file))
            self._close = weakref.finalize(self, _close, self._records)
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; on disk after `flush`."""
        with writing(self._file):
            for name, value in values.items():
                self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Forces what was added to disk."""
        with writing(self._file):
            self._records.flush()

    def close(self) -> None:
        """Ends the file. So does the end of this object; what cannot be written then is lost."""
        self.flush()
        self._close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


def _close(records: RecordWriter) -> None:
    with contextlib.suppress(OSError):
        records.close()
