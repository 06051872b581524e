"""Orbax's options for saving and restoring."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

CHUNK_BYTES = 128 * 2**20


def context() -> Any:
    """Orbax's options, as a context manager."""
    import orbax.checkpoint.experimental.v1 as ocp

    def chunks(key: Any, value: Any) -> Any:
        # Rows before columns: a converter and another mesh then read a part without reading all of it.
        if value.nbytes <= CHUNK_BYTES:
            return None
        return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,))

    logging.getLogger("absl").addFilter(_reported_by_us)
    options = ocp.Context()
    options.array_options.saving.use_compression = False  # trained weights do not shrink; zstd halves the speed
    options.array_options.saving.scoped_storage_options_creator = chunks
    return options


def _reported_by_us(record: logging.LogRecord) -> bool:
    """Keeps out the tracebacks that Orbax logs from its threads: the same error comes out of ``save`` or ``wait``."""
    return not (record.levelno >= logging.ERROR and "orbax" in Path(record.pathname).parts)
