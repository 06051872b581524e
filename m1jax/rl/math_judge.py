"""Whether two mathematical answers are equal, by math-verify, with a time limit that always holds.

math-verify's own limits use SIGALRM: they work in the main thread only, and a power tower inside sympy's integers never
returns to the interpreter to see the signal. So the judging runs in one helper process, which is killed and replaced
when it takes too long.
"""

import atexit
import contextlib
import json
import select
import subprocess
import sys
from pathlib import Path

_WORKER = Path(__file__).with_name("math_judge_worker.py")
_START_SECONDS = 120.0


class MathJudge:
    """Judges answers; the helper process starts with the first question that plain comparison cannot decide.

    Args:
        timeout: seconds for one judgement; beyond it the answer counts as wrong.
    """

    def __init__(self, timeout: float = 5.0):
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, expected: str, answer: str) -> bool:
        """True where the answer is the expected one, as text or as mathematics (`0.5` and `\\frac12`)."""
        if expected.strip() == answer.strip():
            return True
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([expected, answer]).encode() + b"\n")
            process.stdin.flush()
            return self._read(self._timeout) == "true"
        except (TimeoutError, BrokenPipeError, EOFError):
            self.close()
            return False

    def close(self) -> None:
        """Ends the helper process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.close)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        # Run as a file, not as a module of this package: the helper needs neither jax nor its start-up time.
        process = subprocess.Popen([sys.executable, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process = process
        atexit.register(self.close)
        if self._read(_START_SECONDS) != "ready":
            raise RuntimeError("the helper process that judges mathematical answers did not start")
        return process

    def _read(self, seconds: float) -> str:
        """One line from the helper. The protocol is one answer per question, so nothing is left in the pipe's
        buffer."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        return line.decode().strip()
