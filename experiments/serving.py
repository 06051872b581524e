"""A server in a process of its own, for the experiments that measure it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def serving(model: Path, *options: str, before: Sequence[str] = ()) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of `m1jax serve`; ended by SIGTERM, which must be obeyed within 30 s and with status 0.

    `before`: words in front of the command, as `taskset -c 0`, which must become the process itself.
    """
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "m1jax.cli", "serve", str(model), "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise RuntimeError(f"the server did not start: {line!r}")
        yield "http://" + line.split("http://")[1].split("/")[0], process
        process.terminate()
        status = process.wait(30)
        if status != 0:
            raise RuntimeError(f"the server ended with status {status}")
    finally:
        process.kill()
        process.communicate()
