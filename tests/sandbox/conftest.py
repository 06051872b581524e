"""Who runs the programs: root and an ordinary user, or only the latter where the tests are not run by root."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m1jax import sandbox


class AsUser:
    """A pool in a process of an ordinary user, where this one is root's."""

    def __init__(self, environment):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("as_user.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, command, *, stdin="", limits=None):
        limits = vars(limits or sandbox.Limits())
        self._process.stdin.write(json.dumps({"command": command, "stdin": stdin, "limits": limits}) + "\n")
        self._process.stdin.flush()
        return sandbox.Result(**json.loads(self._process.stdout.readline()))

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(60) == 0


@pytest.fixture(scope="session", params=["root", "user"])
def pool(request):
    """One worker, kept for all tests: what one program does must not reach the next."""
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    secret = {"M1JAX_SECRET": "open-sesame"}
    if request.param == "user" and os.geteuid() == 0:
        root = str(Path(__file__).parents[2])
        made = AsUser({**os.environ, **secret, "PYTHONPATH": root})
    else:
        os.environ.update(secret)
        made = sandbox.Pool(1)
    with contextlib.closing(made):
        yield made
